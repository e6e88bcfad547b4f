"""django_tasks_local runs Django's background tasks inside the web process, with live progress."""

from .backends import ProcessPoolBackend, ThreadPoolBackend
from .exceptions import QueueFull, ShuttingDown, TaskCancelled

# This statement also binds the module `hub` to the same name first, if no other module has imported
# it yet, and the object afterwards.
from .hub import hub
from .operations import acancel, ajoin, aretry, cancel, join, retry
from .processes.child import in_worker_process
from .progress import current_result_id, report_progress, track

__all__ = [
    "ProcessPoolBackend",
    "QueueFull",
    "ShuttingDown",
    "TaskCancelled",
    "ThreadPoolBackend",
    "acancel",
    "ajoin",
    "aretry",
    "cancel",
    "current_result_id",
    "hub",
    "in_worker_process",
    "join",
    "report_progress",
    "retry",
    "track",
]
