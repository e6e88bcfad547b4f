"""TaskQueue is a pool's first-in-first-out queue; a cancelled task leaves it from any place."""

from __future__ import annotations

import sys
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, override

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..record import TaskRecord


class TaskQueue[RecordT: TaskRecord]:
    """
    The queue of the tasks that wait. Methods may be called from any thread.

    It is no deque, because a deque would have to be searched for a cancelled task, or keep the task
    and its arguments until the workers reach it. It needs no lock while Python has a GIL, because
    each change of the OrderedDict is one call of a C function, which is atomic.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[str, RecordT] = OrderedDict()

    def append(self, record: RecordT) -> None:
        """Add a task at the end of the queue."""
        self._records[record.id] = record

    def appendleft(self, record: RecordT) -> None:
        """Put a task back at the front of the queue."""
        self._records[record.id] = record
        try:
            self._records.move_to_end(record.id, last=False)
        except KeyError:
            return  # Another thread has taken or discarded the task after it was added above.

    def popleft(self) -> RecordT:
        """Remove and return the first task. Raises IndexError if the queue is empty."""
        try:
            return self._records.popitem(last=False)[1]
        except KeyError:
            raise IndexError("The queue is empty.") from None

    def discard(self, record: RecordT) -> None:
        """Remove this task from the queue; do nothing if the queue does not have it."""
        self._records.pop(record.id, None)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[RecordT]:
        """Iterate over a copy of the queue, which one atomic step makes."""
        return iter(list(self._records.values()))


class LockedTaskQueue[RecordT: TaskRecord](TaskQueue[RecordT]):
    """
    A TaskQueue with a lock, for Python without a GIL, where an OrderedDict is not thread-safe.

    CPython 3.13t crashed when one thread copied an OrderedDict while another thread changed it.
    With a GIL the lock would have no use and would cost time: if a thread loses the GIL while it
    holds the lock, all other threads wait for this thread.

    The lock also orders what different threads read. A pool has flags that one thread reads after
    it has changed the queue, and that another thread sets before it checks the queue: a worker is
    coming, a worker is idle, the dispatcher wants tasks, positions have changed. With the lock, the
    second thread finds the change, or the first thread reads the new flag. So `len()` takes the
    lock too, and no thread may call it while it holds another lock: a finalizer in append() could
    need that lock.
    """

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.RLock()

    @override
    def append(self, record: RecordT) -> None:
        with self._lock:
            super().append(record)

    @override
    def appendleft(self, record: RecordT) -> None:
        with self._lock:
            super().appendleft(record)

    @override
    def popleft(self) -> RecordT:
        with self._lock:
            return super().popleft()

    @override
    def discard(self, record: RecordT) -> None:
        with self._lock:
            super().discard(record)

    @override
    def __len__(self) -> int:
        with self._lock:
            return super().__len__()

    @override
    def __iter__(self) -> Iterator[RecordT]:
        with self._lock:
            return super().__iter__()


def make_queue[RecordT: TaskRecord]() -> TaskQueue[RecordT]:
    """Return a TaskQueue, or a LockedTaskQueue if this Python runs without a GIL."""
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return TaskQueue() if has_gil else LockedTaskQueue()
