"""
This module publishes events for the tasks of other backends when Django's task signals are sent.

The receivers turn the signals of every other backend (Django's ImmediateBackend, django-tasks-db,
...) into the same events. They also make `current_result_id` and `report_progress()` work in its
tasks.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from django.dispatch import receiver
from django.tasks.signals import task_enqueued, task_finished, task_started

from .events import ENQUEUED_SEQUENCE, STARTED_SEQUENCE, EventKind, Progress
from .hub import hub
from .logs import get_logger
from .progress import current_result_id
from .progress.reporter import PROGRESS_INTERVAL, Reporter, Reporting, current_reporting
from .publishing import event_from_result, retried_id, run_of

if TYPE_CHECKING:
    from contextvars import Token

    from .aliases import AnyResult, TaskKey
    from .cancellation import Cancellation

logger = get_logger(__name__)


class ForeignTask(Reporting):
    """A task of another backend that is running in this process."""

    def __init__(self, task_result: AnyResult) -> None:
        self.id = task_result.id
        self.lock = threading.RLock()
        self.interval = PROGRESS_INTERVAL
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        # If the backend does not state when it started the task, the current time replaces it.
        self.run = run_of(task_result) or int(time.time() * 1000)
        # Copy the state into an event now, because the backend may change this TaskResult object
        # until its task ends.
        self._started = event_from_result(
            task_result, kind=EventKind.STARTED, run=self.run, sequence=STARTED_SEQUENCE
        )
        # finish() restores the former values by these tokens, because a task that the
        # ImmediateBackend runs may itself run another one.
        self._result_id_token: Token[str] = current_result_id.set(task_result.id)
        self._reporting_token: Token[Reporting | None] = current_reporting.set(self)

    @property
    def is_finished(self) -> bool:
        """Return False; finish() closes an existing reporter, and the hub drops later samples."""
        return False

    def start(self) -> None:
        """Publish the event `started`."""
        hub.publish(self._started)

    def report(self, number: int, progress: Progress) -> None:
        """Publish a sample of the task's progress; `number` is 1 for the first sample."""
        sequence = STARTED_SEQUENCE + number
        hub.publish(
            replace(self._started, kind=EventKind.PROGRESS, sequence=sequence, progress=progress)
        )

    def finish(self, task_result: AnyResult) -> None:
        """Publish the event `finished`, which has the last sample of the progress."""
        # reset() raises ValueError if the backend sends task_started and task_finished in two
        # different contexts. Then the present context has no value to restore.
        with suppress(ValueError):
            current_reporting.reset(self._reporting_token)
            current_result_id.reset(self._result_id_token)
        number, progress = self.close_progress()
        hub.publish(
            event_from_result(
                task_result,
                kind=EventKind.FINISHED,
                run=self.run,
                sequence=STARTED_SEQUENCE + number + 1,
                progress=progress,
            )
        )


# The receivers below are connected with these values of `dispatch_uid`, by which `pools.signals`
# recognizes them.
ENQUEUED_UID = "django_tasks_local.enqueued"
STARTED_UID = "django_tasks_local.started"
FINISHED_UID = "django_tasks_local.finished"

# The tasks for which this process has received task_started but not task_finished. RUNNING_LIMIT
# bounds them, because task_finished may be sent in another process, or never.
_running: dict[TaskKey, ForeignTask] = {}
RUNNING_LIMIT = 1000  # tasks


def _forget_oldest() -> None:
    # Another thread may change `_running` concurrently, which raises one of these exceptions. The
    # caller then tries again if there are still too many tasks.
    with suppress(StopIteration, KeyError, RuntimeError):
        oldest = _running.pop(next(iter(_running)))
        logger.debug("Task id=%s has not finished; its later reports are ignored.", oldest.id)
        oldest.close_progress()


def _publishes_events(sender: Any) -> bool:
    return getattr(sender, "publishes_events", False)


@receiver(task_enqueued, dispatch_uid=ENQUEUED_UID)
def _on_enqueued(sender: Any, task_result: AnyResult, **kwargs: Any) -> None:
    if not _publishes_events(sender):
        retried_from = retried_id.get()
        if retried_from is not None:
            # A task that the ImmediateBackend runs in enqueue() may itself enqueue other tasks.
            retried_id.set(None)
        event = event_from_result(
            task_result,
            kind=EventKind.ENQUEUED,
            run=0,
            sequence=ENQUEUED_SEQUENCE,
            retried_from=retried_from,
        )
        hub.publish(event)


@receiver(task_started, dispatch_uid=STARTED_UID)
def _on_started(sender: Any, task_result: AnyResult, **kwargs: Any) -> None:
    if not _publishes_events(sender):
        task = _running[task_result.backend, task_result.id] = ForeignTask(task_result)
        task.start()
        while len(_running) > RUNNING_LIMIT:
            _forget_oldest()


@receiver(task_finished, dispatch_uid=FINISHED_UID)
def _on_finished(sender: Any, task_result: AnyResult, **kwargs: Any) -> None:
    if _publishes_events(sender):
        return
    task = _running.pop((task_result.backend, task_result.id), None)
    if task is not None:
        task.finish(task_result)
        return
    # The task was started in another process, or its backend has not sent task_started.
    event = event_from_result(task_result, kind=EventKind.FINISHED)
    hub.publish(event)
