"""django_tasks_local runs Django's background tasks inside the web process, with live progress."""

from .backends import ProcessPoolBackend, ThreadPoolBackend, cancel
from .progress import current_result_id, report_progress, track

__all__ = [
    "ProcessPoolBackend",
    "ThreadPoolBackend",
    "cancel",
    "current_result_id",
    "report_progress",
    "track",
]
