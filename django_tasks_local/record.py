"""
TaskRecord has the whole state of a pool's task; only this module changes the status of a task.

    READY --start()--> RUNNING --succeed()--> SUCCESSFUL
      |                   +------fail()-----> FAILED
      +-----------fail()--------------------> FAILED

The store of results, the queue, the worker and the hub, as its topic, all use this one object. It
holds plain values. TaskResult and TaskEvent objects are created when a receiver, a subscription or
a caller of get_result() reads them; most tasks need none. Each record has its own lock: if all
tasks shared one, a thread that loses the GIL while it holds it would block all other threads.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from django.tasks import TaskResultStatus
from django.utils import timezone

from .events import ENQUEUED_SEQUENCE, STARTED_SEQUENCE, EventKind, TaskEvent
from .hub import hub
from .progress.reporter import Reporting
from .publishing import failure
from .pubsub.latest import Topic
from .results import make_result

if TYPE_CHECKING:
    from datetime import datetime

    from django.tasks.base import TaskError

    from .aliases import AnyResult, AnyTask
    from .cancellation import Cancellation
    from .context import Carried
    from .events import Progress
    from .progress.reporter import Reporter

READY = TaskResultStatus.READY
RUNNING = TaskResultStatus.RUNNING
FAILED = TaskResultStatus.FAILED
SUCCESSFUL = TaskResultStatus.SUCCESSFUL

# A task that is READY may fail without a start: it was cancelled or lost, or no worker could be
# started. The moves are in a tuple, because a set would call the enum's hash function, which is
# written in Python and slower.
LEGAL_MOVES = ((READY, RUNNING), (RUNNING, SUCCESSFUL), (RUNNING, FAILED), (READY, FAILED))


class TaskRecord(Topic, Reporting):
    """
    Holds the state of one task of a pool and publishes its changes.

    Any thread may call its methods. A change of the status not in LEGAL_MOVES has no effect.
    """

    __slots__ = (  # noqa: RUF023 - grouped by meaning
        # The following attributes never change.
        "args",
        "carried",
        "enqueued_at",
        "interval",
        "kwargs",
        "retried_from",
        "task",
        # `lock` guards changes of the following attributes, and of the event.
        "changes",
        "cancellation",
        "error",
        "error_message",
        "finished_at",
        "number",
        "position",
        "progress",
        "reporter",
        "return_value",
        "started_at",
        "status",
        "unfinished",
        "worker_id",
    )

    # The base class Topic also allows None, for an id of any backend; a record has its alias.
    backend: str

    def __init__(
        self,
        task: AnyTask,
        id: str,
        args: list[Any],
        kwargs: dict[str, Any],
        backend: str,
        enqueued_at: datetime,
        interval: float,
        carried: Carried | None = None,
    ) -> None:
        # This repeats Topic.__init__(): a call takes one hundredth of this package's time per task.
        self.backend = backend
        self.id = id
        self.lock = threading.RLock()
        self._event: TaskEvent | None = None
        self.changes = 0  # The number of changes of the state so far.
        self.readers = None
        self.is_kept = True
        self.is_gone = False
        self.successor = None
        self.task = task
        self.args = args
        self.kwargs = kwargs
        self.enqueued_at = enqueued_at
        self.carried = carried  # None for most tasks
        self.retried_from: str | None = None  # Pool.enqueue() sets it before enqueue().
        self.interval = interval  # At least this many seconds pass between two progress samples.
        self.status = READY
        self.position: int | None = None  # The last published number of tasks before this one.
        self.number = 0  # The number of the last progress sample; 0 if there was none.
        self.progress: Progress | None = None
        self.started_at: datetime | None = None
        self.finished_at: datetime | None = None
        self.worker_id: str | None = None
        self.error: TaskError | None = None
        self.error_message: str | None = None
        self.return_value: Any = None
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        # The set of unfinished records that ResultStore counts; None if it has no limit.
        self.unfinished: set[TaskRecord] | None = None

    # Methods that read the state

    @property
    def path(self) -> str:
        """Return the dotted path of the task's function."""
        return self.task.module_path

    @property
    def is_finished(self) -> bool:
        """Return whether the task has an outcome, SUCCESSFUL or FAILED."""
        return self.finished_at is not None

    def task_result(self) -> AnyResult:
        """Return the present state as a TaskResult, which later changes do not update."""
        with self.lock:
            status, started_at, finished_at = self.status, self.started_at, self.finished_at
            worker_id, error, return_value = self.worker_id, self.error, self.return_value
        return make_result(
            self.task,
            self.id,
            status,
            self.enqueued_at,
            started_at,
            finished_at,
            self.args.copy(),
            self.kwargs.copy(),
            self.backend,
            [] if error is None else [error],
            [] if worker_id is None else [worker_id],
            return_value,
        )

    @property
    def event(self) -> TaskEvent:
        """Return the latest event; the first access after a change creates a new object."""
        event = self._event
        while event is None:
            changes, made = _make_event(self)
            with self.lock:
                if self._event is None and self.changes == changes:
                    self._event = made
                # None if another thread, or a finalizer in this one, has changed the task between
                # _make_event() and this lock; then the loop makes a new event.
                event = self._event
        return event

    # Methods that change the state. Invariant: they call no function while they hold the lock,
    # except for the recorders of a test. A finalizer may run during any call and wait for the lock
    # of another task, whose thread may wait for this lock: a deadlock.

    def enqueue(self, position: int) -> None:
        """Add the task to the hub and publish that `position` tasks wait before it."""
        with self.lock:
            if self.status is not READY:
                return  # Another thread has closed the pool concurrently and failed the task.
            self.position = position
            self.changes += 1
            self._event = None
            if hub.recorders:
                hub.record(self)
        hub.add(self)
        if self.readers or hub.to_all:
            hub.notify(self)

    def move_up(self, position: int) -> None:
        """Publish that `position` tasks wait before this one, if fewer than published before."""
        with self.lock:
            if self.status is not READY or self.position is None or position >= self.position:
                return
            self.position = position
            self.changes += 1
            self._event = None
            if hub.recorders:
                hub.record(self)
        if self.readers or hub.to_all:
            hub.notify(self)

    def start(self, worker_id: str, at: datetime | None = None) -> bool:
        """Change READY to RUNNING, since `at` or now; return False if the task is not READY."""
        if at is None:
            at = timezone.now()
        with self.lock:
            if (self.status, RUNNING) not in LEGAL_MOVES:
                return False
            self.status = RUNNING
            self.started_at = at
            self.worker_id = worker_id
            self.changes += 1
            self._event = None
            if hub.recorders:
                hub.record(self)
        if self.readers or hub.to_all:
            hub.notify(self)
        return True

    def report(self, number: int, progress: Progress) -> None:
        """Publish progress sample `number`, unless a later one or the outcome was published."""
        with self.lock:
            if self.status is not RUNNING or number <= self.number:
                return
            self.number, self.progress = number, progress
            self.changes += 1
            self._event = None
            if hub.recorders:
                hub.record(self)
        if self.readers or hub.to_all:
            hub.notify(self)

    def succeed(self, return_value: Any, last: tuple[int, Progress | None] | None = None) -> bool:
        """Change RUNNING to SUCCESSFUL; return False if not RUNNING. For `last` see fail()."""
        return self._finish(SUCCESSFUL, return_value, None, None, last)

    def fail(
        self,
        error: TaskError,
        message: str | None,
        last: tuple[int, Progress | None] | None = None,
        *,
        only_waiting: bool = False,
    ) -> bool:
        """
        Change READY or RUNNING to FAILED; return False if the task has another status.

        With `only_waiting` only a READY task fails, and only after enqueue() has published it.
        `message` is the text of the exception. `last` is the number of the last progress sample and
        the sample, if a worker process has reported it.
        """
        return self._finish(FAILED, None, error, message, last, only_waiting)

    def _finish(
        self,
        status: TaskResultStatus,
        return_value: Any,
        error: TaskError | None,
        message: str | None,
        last: tuple[int, Progress | None] | None,
        only_waiting: bool = False,
    ) -> bool:
        # With `only_waiting` no reporter is closed: a READY task has none, and a task that runs is
        # not failed and must keep its reporter open.
        reporter = None if only_waiting else self.reporter
        if last is None and reporter is not None:
            # Race: another thread may be about to publish a sample. The reporter publishes nothing
            # after close(), so no sample can follow the event `finished`.
            last = reporter.close()
        now = timezone.now()
        with self.lock:
            if only_waiting and (self.status is not READY or self.position is None):
                return False
            if (self.status, status) not in LEGAL_MOVES:
                return False
            self.status = status
            self.return_value, self.error, self.error_message = return_value, error, message
            if last is not None:
                self.number, self.progress = last
            self.finished_at = now
            self.reporter = None  # This breaks a reference cycle, which would keep both alive.
            self.changes += 1
            self._event = None
            if hub.recorders:
                hub.record(self)
        if self.unfinished is not None:
            self.unfinished.discard(self)
        if self.readers or hub.to_all:
            hub.notify(self)
        return True


def _make_event(record: TaskRecord) -> tuple[int, TaskEvent]:
    """Return the number of changes so far, and an event of the state after these changes."""
    with record.lock:
        changes, status, position = record.changes, record.status, record.position
        number, progress, started_at = record.number, record.progress, record.started_at
        finished_at, return_value = record.finished_at, record.return_value
        error, message = record.error, record.error_message
    if status is READY:
        kind, sequence = EventKind.ENQUEUED, ENQUEUED_SEQUENCE
    elif status is not RUNNING:
        kind, sequence = EventKind.FINISHED, STARTED_SEQUENCE + number + 1
    elif progress is None:
        kind, sequence = EventKind.STARTED, STARTED_SEQUENCE
    else:
        kind, sequence = EventKind.PROGRESS, STARTED_SEQUENCE + number
    return changes, TaskEvent(
        id=record.id,
        run=0 if started_at is None else 1,
        sequence=sequence,
        kind=kind,
        status=status,
        name=record.task.name,
        backend=record.backend,
        position=position if status is READY else None,
        retried_from=record.retried_from,
        progress=progress,
        enqueued_at=record.enqueued_at,
        started_at=started_at,
        finished_at=finished_at,
        error=None if error is None else failure(error, message),
        return_value=return_value,
    )
