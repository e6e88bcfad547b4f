"""
Events for the tasks of other backends, made from Django's task signals.

For tasks of every other backend (Django's ImmediateBackend, django-tasks-db, ...) Django's signals
are turned into the same events, and `current_result_id` and `report_progress()` work there too.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from django.dispatch import receiver
from django.tasks.signals import task_enqueued, task_finished, task_started

from .events import ENQUEUED_SEQUENCE, STARTED_SEQUENCE, EventKind, Progress
from .hub import hub
from .progress import current_result_id
from .progress.reporter import PROGRESS_INTERVAL, Reporter, Reporting, current_reporting
from .publishing import event_from_result, run_of

if TYPE_CHECKING:
    from contextvars import Token

    from .aliases import AnyResult, TaskKey
    from .cancellation import Cancellation

logger = logging.getLogger(__name__)


class ForeignTask(Reporting):
    """A task of another backend that runs in this process now."""

    def __init__(self, task_result: AnyResult) -> None:
        self.id = task_result.id
        self.lock = threading.RLock()
        self.interval = PROGRESS_INTERVAL
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        # A backend that does not state when it started the task gets the time of this process.
        self.run = run_of(task_result) or int(time.time() * 1000)
        # A copy of the state: a backend may change this very result until its task ends.
        self._started = event_from_result(
            task_result, kind=EventKind.STARTED, run=self.run, sequence=STARTED_SEQUENCE
        )
        # Tokens, because tasks of the ImmediateBackend nest.
        self._result_id_token: Token[str] = current_result_id.set(task_result.id)
        self._reporting_token: Token[Reporting | None] = current_reporting.set(self)

    @property
    def is_finished(self) -> bool:
        """See Reporting; the reporter of a foreign task is closed by finish()."""
        return False

    def start(self) -> None:
        """Publish `started`."""
        hub.publish(self._started)

    def report(self, number: int, progress: Progress) -> None:
        """Publish sample `number` of the task's progress."""
        sequence = STARTED_SEQUENCE + number
        hub.publish(
            replace(self._started, kind=EventKind.PROGRESS, sequence=sequence, progress=progress)
        )

    def finish(self, task_result: AnyResult) -> None:
        """Publish `finished`, after the last sample of the progress."""
        # A backend may finish a task in another context than the one that started it. That context
        # is gone, so there is nothing to restore.
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


# How the receivers below are registered. `pools.signals` recognizes them by these names.
ENQUEUED_UID = "django_tasks_local.enqueued"
STARTED_UID = "django_tasks_local.started"
FINISHED_UID = "django_tasks_local.finished"

# The tasks that a signal has begun and no signal has ended, at most RUNNING_LIMIT: of a task whose
# end is reported in another process, or not at all, no signal comes.
_running: dict[TaskKey, ForeignTask] = {}
RUNNING_LIMIT = 1000  # tasks


def _forget_oldest() -> None:
    with suppress(StopIteration, KeyError, RuntimeError):  # Another thread has done it.
        oldest = _running.pop(next(iter(_running)))
        logger.debug("Task id=%s has no end yet; its reports are ignored.", oldest.id)
        oldest.close_progress()


def _publishes_events(sender: Any) -> bool:
    return getattr(sender, "publishes_events", False)


@receiver(task_enqueued, dispatch_uid=ENQUEUED_UID)
def _on_enqueued(sender: Any, task_result: AnyResult, **kwargs: Any) -> None:
    if not _publishes_events(sender):
        event = event_from_result(
            task_result, kind=EventKind.ENQUEUED, run=0, sequence=ENQUEUED_SEQUENCE
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
    # The task ran in another process, or its start had no signal.
    event = event_from_result(task_result, kind=EventKind.FINISHED)
    hub.publish(event)
