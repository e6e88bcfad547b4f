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
from datetime import datetime
from typing import TYPE_CHECKING, Any

from django.tasks import TaskResultStatus

from .events import ENQUEUED_SEQUENCE, STARTED_SEQUENCE, EventKind, TaskEvent
from .hub import hub
from .progress.reporter import Reporting
from .publishing import failure
from .pubsub.latest import Topic
from .results import make_result

if TYPE_CHECKING:
    from collections.abc import Sequence

    from django.tasks.base import TaskError

    from .aliases import AnyResult, AnyTask
    from .cancellation import Cancellation
    from .events import Progress
    from .progress.reporter import Reporter
    from .pubsub.latest import Reader

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
            started_at, worker_id, error = self.started_at, self.worker_id, self.error
            return make_result(
                self.task,
                self.id,
                self.status,
                self.enqueued_at,
                started_at,
                self.finished_at,
                self.args.copy(),
                self.kwargs.copy(),
                self.backend,
                [] if error is None else [error],
                [] if worker_id is None else [worker_id],
                self.return_value,
            )

    @property
    def event(self) -> TaskEvent:
        """The latest event: created at its first access, and the same object until a later one."""
        event = self._event
        if event is None:
            with self.lock:
                event = self._event
                if event is None:
                    event = self._event = self._make_event()
        return event

    def _make_event(self) -> TaskEvent:
        status, progress = self.status, self.progress
        if status is READY:
            kind, sequence = EventKind.ENQUEUED, ENQUEUED_SEQUENCE
        elif status is not RUNNING:
            kind, sequence = EventKind.FINISHED, STARTED_SEQUENCE + self.number + 1
        elif progress is None:
            kind, sequence = EventKind.STARTED, STARTED_SEQUENCE
        else:
            kind, sequence = EventKind.PROGRESS, STARTED_SEQUENCE + self.number
        return TaskEvent(
            id=self.id,
            run=0 if status is READY else 1,
            sequence=sequence,
            kind=kind,
            status=status,
            name=self.task.name,
            backend=self.backend,
            position=self.position if status is READY else None,
            progress=progress,
            enqueued_at=self.enqueued_at,
            started_at=self.started_at,
            finished_at=self.finished_at,
            error=None if self.error is None else failure(self.error, self.error_message),
            return_value=self.return_value,
        )

    # Changing

    def enqueue(self, position: int) -> None:
        """Make the task known to the hub, with `position` tasks before it."""
        with self.lock:
            if self.status is not READY:
                return  # Its pool was discarded concurrently by another thread.
            self.position = position
            hub.add(self)
            readers = self._mark()
        _wake(readers)

    def move_up(self, position: int) -> None:
        """Publish that only `position` tasks are before it, if that is fewer than published."""
        with self.lock:
            if self.status is not READY or self.position is None or position >= self.position:
                return
            self.position = position
            readers = self._mark()
        _wake(readers)

    def start(self, worker_id: str, at: datetime | None = None) -> bool:
        """READY -> RUNNING, now or `at`; False if the task is not READY."""
        with self.lock:
            if not self._move(RUNNING):
                return False
            self.started_at = self._now() if at is None else at
            self.worker_id = worker_id
            readers = self._mark()
        _wake(readers)
        return True

    def report(self, number: int, progress: Progress) -> None:
        """Publish sample `number` of the progress, unless a later one or the end was published."""
        with self.lock:
            # No call stands between the comparison and the assignment, so that a finalizer, which
            # runs at calls, cannot report a later sample in between.
            if self.status is not RUNNING or number <= self.number:
                return
            self.number, self.progress = number, progress
            readers = self._mark()
        _wake(readers)

    def succeed(self, return_value: Any, last: tuple[int, Progress | None] | None = None) -> bool:
        """RUNNING -> SUCCESSFUL; False if the task is not RUNNING. For `last` see fail()."""
        with self.lock:
            if not self._move(SUCCESSFUL):
                return False
            self.return_value = return_value
            readers = self._finish_locked(last)
        _wake(readers)
        return True

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
        with self.lock:
            if only_waiting and (self.status is not READY or self.position is None):
                return False
            if not self._move(FAILED):
                return False
            self.error, self.error_message = error, message
            readers = self._finish_locked(last)
        _wake(readers)
        return True

    def _now(self) -> datetime:
        # What timezone.now() returns, without its lookup of USE_TZ: aware as `enqueued_at` is.
        return datetime.now(self.enqueued_at.tzinfo)

    def _move(self, status: TaskResultStatus) -> bool:
        """Change the status if that is legal. The caller has the lock."""
        if (self.status, status) not in LEGAL_MOVES:
            return False
        self.status = status
        return True

    def _finish_locked(self, last: tuple[int, Progress | None] | None) -> Sequence[Reader]:
        # The event `finished` follows the last sample, even if a thread is about to publish that.
        if last is not None:
            self.number, self.progress = last
        elif self.reporter is not None:
            self.number, self.progress = self.reporter.close()
        if self.unfinished is not None:
            self.unfinished.discard(self)
        self.finished_at = self._now()
        return self._mark()

    def _mark(self) -> Sequence[Reader]:
        """
        Discard the previous event; return the readers to wake after the lock is released.

        The caller has the lock.
        """
        self._event = None
        if self.readers or hub.to_all or hub.recorders:
            return hub.mark(self)
        return ()


def _wake(readers: Sequence[Reader]) -> None:
    for reader in readers:
        reader.wake()
