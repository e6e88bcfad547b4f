"""The functions of this module convert a TaskResult and its error to the parts of a TaskEvent."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

from django.tasks import TaskResultStatus

from . import exceptions
from .events import (
    ENQUEUED_SEQUENCE,
    LAST_SEQUENCE,
    STARTED_SEQUENCE,
    EventKind,
    FailureReason,
    Progress,
    TaskEvent,
    TaskFailure,
)

if TYPE_CHECKING:
    from django.tasks.base import TaskError

    from .aliases import AnyResult

# retry() sets the id of the old task while it enqueues a task of another backend again.
retried_id: ContextVar[str | None] = ContextVar("retried_id", default=None)

_REASONS = {
    f"{exception.__module__}.{exception.__qualname__}": reason
    for exception, reason in (
        (exceptions.TaskCancelled, FailureReason.CANCELLED),
        (exceptions.TaskLost, FailureReason.LOST),
        (exceptions.TaskTimeout, FailureReason.TIMEOUT),
        (exceptions.WorkerDied, FailureReason.DIED),
    )
}


def failure(error: TaskError, message: str | None = None) -> TaskFailure:
    """
    Return the description of an error for an event.

    If `message` is None, the text after ": " in the last line of the traceback is used.
    """
    path = error.exception_class_path
    if message is None:
        last_line = error.traceback.rstrip().rpartition("\n")[2]
        message = last_line.partition(": ")[2]
    reason = _REASONS.get(path, FailureReason.FAILED)
    return TaskFailure(reason=reason, type=path, message=message)


def run_of(task_result: AnyResult) -> int:
    """
    Return the run number of another backend's task: its last start in milliseconds since 1970.

    The backend has stored this time, so every process returns the same number. Returns 0 before
    the first start.
    """
    started_at = task_result.last_attempted_at or task_result.started_at
    return 0 if started_at is None else int(started_at.timestamp() * 1000)


def event_from_result(
    task_result: AnyResult,
    *,
    kind: EventKind | None = None,
    run: int | None = None,
    sequence: int | None = None,
    progress: Progress | None = None,
    retried_from: str | None = None,
) -> TaskEvent:
    """
    Return the event that describes the state of a task result.

    For a result that was read from another backend's store, omit `kind`, `run` and `sequence`: they
    are derived from the result's status and start time.
    """
    if kind is None:
        kind = {
            TaskResultStatus.READY: EventKind.ENQUEUED,
            TaskResultStatus.RUNNING: EventKind.STARTED,
        }.get(task_result.status, EventKind.FINISHED)
    if sequence is None:
        sequence = {
            EventKind.ENQUEUED: ENQUEUED_SEQUENCE,
            EventKind.STARTED: STARTED_SEQUENCE,
        }.get(kind, LAST_SEQUENCE)
    failed = task_result.status == TaskResultStatus.FAILED and task_result.errors
    succeeded = task_result.status == TaskResultStatus.SUCCESSFUL
    return TaskEvent(
        id=task_result.id,
        run=run_of(task_result) if run is None else run,
        sequence=sequence,
        kind=kind,
        status=task_result.status,
        name=task_result.task.name,
        backend=task_result.backend,
        retried_from=retried_from,
        progress=progress,
        enqueued_at=task_result.enqueued_at,
        started_at=task_result.started_at,
        finished_at=task_result.finished_at,
        error=failure(task_result.errors[-1]) if failed else None,
        return_value=task_result.return_value if succeeded else None,
    )
