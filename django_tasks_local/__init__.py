"""Background tasks for Django, with live progress, inside the web process."""

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
