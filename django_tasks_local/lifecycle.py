"""
The life of a task -> hub events.

A backend of this package owns a Publication for each of its tasks. For tasks of every other backend
(Django's ImmediateBackend, django-tasks-db, ...) Django's own task signals are turned into the
same events, and `current_result_id` and `report_progress()` work there too.
"""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from django.dispatch import receiver
from django.tasks import TaskResultStatus
from django.tasks.signals import task_enqueued, task_finished, task_started

from . import exceptions
from .events import LAST_SEQUENCE, EventKind, FailureReason, Progress, TaskEvent, TaskFailure
from .hub import hub
from .progress.reporter import (
    PROGRESS_INTERVAL,
    Reporter,
    Reporting,
    current_reporting,
    current_result_id,
)

if TYPE_CHECKING:
    from contextvars import Token

    from django.tasks import TaskResult
    from django.tasks.base import TaskError

    from .cancellation import Cancellation

    type AnyResult = TaskResult[Any, Any]

ENQUEUED_SEQUENCE = 1
STARTED_SEQUENCE = 2

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
    """Describe an error; without `message` it is the last line of the traceback."""
    path = error.exception_class_path
    if message is None:
        last_line = error.traceback.rstrip().rpartition("\n")[2]
        message = last_line.partition(": ")[2]
    reason = _REASONS.get(path, FailureReason.FAILED)
    return TaskFailure(reason=reason, type=path, message=message)


def event_from_result(
    task_result: AnyResult,
    *,
    kind: EventKind | None = None,
    sequence: int | None = None,
    position: int | None = None,
    progress: Progress | None = None,
    message: str | None = None,
) -> TaskEvent:
    """
    Return the event that tells the state of a task result.

    Without `kind` and `sequence` they follow from the status: that is for a result that was read
    from a backend's store. `message` is the text of the last error.
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
        sequence=sequence,
        kind=kind,
        status=task_result.status,
        name=task_result.task.name,
        backend=task_result.backend,
        position=position,
        progress=progress,
        enqueued_at=task_result.enqueued_at,
        started_at=task_result.started_at,
        finished_at=task_result.finished_at,
        error=failure(task_result.errors[-1], message) if failed else None,
        return_value=task_result.return_value if succeeded else None,
    )


def later_state(task_result: AnyResult) -> TaskEvent:
    """
    Return the state of a task: what the hub knows, or what this result tells if that is later.

    The hub knows more, but of a task that runs in another process only that it was enqueued.
    """
    event = hub.snapshot(task_result.id)
    if event is not None and event.is_last:
        return event
    told = event_from_result(task_result)
    return told if event is None or told.version > event.version else event


class Publication:
    """
    Publishes the events of one task, numbered.

    The samples of a task's progress are numbered by its Reporter, so that `finished` comes after
    all of them even when one is still on its way in another thread.
    """

    __slots__ = ("_held", "_task_result")

    def __init__(self, task_result: AnyResult) -> None:
        self._task_result = task_result
        self._held = False  # The hub knows it until it is released, and must not hear of it after.

    def enqueued(self, position: int | None = None, *, hold: bool = False) -> None:
        """Publish `enqueued` with so many tasks before it; see Hub.publish() for `hold`."""
        event = event_from_result(
            self._task_result,
            kind=EventKind.ENQUEUED,
            sequence=ENQUEUED_SEQUENCE,
            position=position,
        )
        self._held = hold
        hub.publish(event, hold=hold)

    def started(self, task_result: AnyResult) -> None:
        """Publish `started`."""
        self._task_result = task_result
        self._publish(EventKind.STARTED, STARTED_SEQUENCE)

    def progress(self, number: int, progress: Progress) -> None:
        """Publish sample `number` of a running task's progress."""
        self._publish(EventKind.PROGRESS, STARTED_SEQUENCE + number, progress)

    def finished(
        self,
        task_result: AnyResult,
        number: int = 0,
        progress: Progress | None = None,
        message: str | None = None,
    ) -> None:
        """Publish `finished`, after sample `number`, which was the last."""
        self._task_result = task_result
        self._publish(EventKind.FINISHED, STARTED_SEQUENCE + number + 1, progress, message)

    def _publish(
        self,
        kind: EventKind,
        sequence: int,
        progress: Progress | None = None,
        message: str | None = None,
    ) -> None:
        publish = hub.amend if self._held else hub.publish
        publish(
            event_from_result(
                self._task_result, kind=kind, sequence=sequence, progress=progress, message=message
            )
        )


class _ForeignTask(Reporting):
    """A task of another backend that runs in this process now."""

    def __init__(self, task_result: AnyResult) -> None:
        self.id = task_result.id
        self.lock = threading.RLock()
        self.interval = PROGRESS_INTERVAL
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        self.has_ended = False
        self.publication = Publication(task_result)
        # Tokens, because tasks of the ImmediateBackend nest.
        self.result_id_token: Token[str] = current_result_id.set(task_result.id)
        self.reporting_token: Token[Reporting] = current_reporting.set(self)

    @property
    def is_finished(self) -> bool:
        """See Reporting."""
        return self.has_ended

    def report(self, number: int, progress: Progress) -> None:
        self.publication.progress(number, progress)

    def close(self, task_result: AnyResult) -> None:
        # A backend may finish a task in another context than the one that started it; that
        # context is gone then, and there is nothing to put back.
        with suppress(ValueError):
            current_reporting.reset(self.reporting_token)
            current_result_id.reset(self.result_id_token)
        with self.lock:
            self.has_ended = True
            number, progress = self.close_progress()
        self.publication.finished(task_result, number, progress)


_foreign_tasks: dict[str, _ForeignTask] = {}


def _publishes_events(sender: Any) -> bool:
    return getattr(sender, "publishes_events", False)


@receiver(task_enqueued, dispatch_uid="django_tasks_local.enqueued")
def _on_enqueued(sender: Any, task_result: AnyResult, **kwargs: Any) -> None:
    if not _publishes_events(sender):
        Publication(task_result).enqueued()


@receiver(task_started, dispatch_uid="django_tasks_local.started")
def _on_started(sender: Any, task_result: AnyResult, **kwargs: Any) -> None:
    if not _publishes_events(sender):
        task = _foreign_tasks[task_result.id] = _ForeignTask(task_result)
        task.publication.started(task_result)


@receiver(task_finished, dispatch_uid="django_tasks_local.finished")
def _on_finished(sender: Any, task_result: AnyResult, **kwargs: Any) -> None:
    if _publishes_events(sender):
        return
    task = _foreign_tasks.pop(task_result.id, None)
    if task is None:
        Publication(task_result).finished(task_result)
    else:
        task.close(task_result)
