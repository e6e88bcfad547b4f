"""
TaskRecord: all that a pool knows of one task, and the only place that changes a status.

    READY --start()--> RUNNING --finish()--> SUCCESSFUL or FAILED
      +---------------finish()-------------> FAILED

One object is the entry of the store of results, the entry of the queue, what a worker runs, and
the topic of the hub. It holds plain values. TaskResult and TaskEvent objects are created when a
receiver, a subscription or a caller of get_result() reads them; most tasks need none. Each record
has its own lock: a thread that loses the GIL while it holds a lock of all tasks makes every other
thread queue behind it.
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
    from .events import Progress
    from .progress.reporter import Reporter

READY = TaskResultStatus.READY
RUNNING = TaskResultStatus.RUNNING
FAILED = TaskResultStatus.FAILED
SUCCESSFUL = TaskResultStatus.SUCCESSFUL

# A task that never started can only fail: it was cancelled or lost, or no worker could be started.
# A tuple, because the members of an enum have a hash function in Python, which is slower.
LEGAL_MOVES = ((READY, RUNNING), (RUNNING, SUCCESSFUL), (RUNNING, FAILED), (READY, FAILED))


class TaskRecord(Topic, Reporting):
    """
    The state of one task of a pool.

    Its methods may be called from any thread. A move that LEGAL_MOVES does not contain does not
    happen, and the method that would make it returns False.
    """

    __slots__ = (  # noqa: RUF023 - grouped by meaning
        # These never change.
        "args",
        "enqueued_at",
        "interval",
        "kwargs",
        "task",
        # `lock` guards the following, and the event.
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

    # A topic's backend is unknown while a subscription waits for an id; a record's never is.
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
    ) -> None:
        # Not super().__init__(): each call costs one hundredth of a task.
        self.backend = backend
        self.id = id
        self.lock = threading.RLock()
        self._event: TaskEvent | None = None
        self.changes = 0  # how often the state has changed
        self.readers = None
        self.is_kept = True
        self.is_gone = False
        self.successor = None
        self.task = task
        self.args = args
        self.kwargs = kwargs
        self.enqueued_at = enqueued_at
        self.interval = interval  # seconds between two samples of the progress, at least
        self.status = READY
        self.position: int | None = None  # tasks before it, as last published
        self.number = 0  # of the last sample of its progress
        self.progress: Progress | None = None
        self.started_at: datetime | None = None
        self.finished_at: datetime | None = None
        self.worker_id: str | None = None
        self.error: TaskError | None = None
        self.error_message: str | None = None
        self.return_value: Any = None
        self.reporter: Reporter | None = None
        self.cancellation: Cancellation | None = None
        # The set of unfinished records of its store, where their number is limited.
        self.unfinished: set[TaskRecord] | None = None

    # Reading

    @property
    def path(self) -> str:
        """The dotted path of the task's function."""
        return self.task.module_path

    @property
    def is_running(self) -> bool:
        """Whether a worker runs the task."""
        return self.status is RUNNING

    @property
    def is_finished(self) -> bool:
        """Whether the state is final."""
        return self.finished_at is not None

    def task_result(self) -> AnyResult:
        """Return a TaskResult of the present state, which later changes do not reach."""
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
        """The latest event: created at its first access, and the same object until a later one."""
        event = self._event
        while event is None:
            changes, made = _make_event(self)
            with self.lock:
                if self._event is None and self.changes == changes:
                    self._event = made
                # None if another thread, or a finalizer of this one, has changed the task.
                event = self._event
        return event

    # Changing. No function is called while a record's lock is held, except for a test's recorders:
    # a finalizer may run at any call, and it may need the lock of another task, whose thread may
    # need this one.

    def enqueue(self, position: int) -> None:
        """Make the task known to the hub, with `position` tasks before it."""
        with self.lock:
            if self.status is not READY:
                return  # Its pool was discarded concurrently by another thread.
            self.position = position
            self.changes += 1
            self._event = None
            if hub.recorders:
                hub.record(self)
        hub.add(self)
        if self.readers or hub.to_all:
            hub.notify(self)

    def move_up(self, position: int) -> None:
        """Publish that only `position` tasks are before it, if that is fewer than published."""
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
        """READY -> RUNNING, now or `at`; False if the task is not READY."""
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
        """Publish sample `number` of the progress, unless a later one or the end was published."""
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
        """RUNNING -> SUCCESSFUL; False if the task is not RUNNING. For `last` see fail()."""
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
        READY, or RUNNING unless `only_waiting`, -> FAILED; False if the task has another status.

        With `only_waiting` a task that enqueue() has not published yet does not fail. `message` is
        the text of the exception. `last` is the last sample of the progress and its number, if
        another process has reported it.
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
        # A task that may still wait has no reporter, or it runs and its reporter must stay open.
        reporter = None if only_waiting else self.reporter
        if last is None and reporter is not None:
            # The event `finished` follows the last sample, even if a thread is about to publish
            # that: the reporter publishes nothing after close().
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
            self.reporter = None  # It refers to this record: a cycle would keep both alive.
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
    """Return the event of the present state, and the number of changes before it."""
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
        progress=progress,
        enqueued_at=record.enqueued_at,
        started_at=started_at,
        finished_at=finished_at,
        error=None if error is None else failure(error, message),
        return_value=return_value,
    )
