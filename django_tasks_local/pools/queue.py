"""The queue of a pool: first in, first out, and out of the middle when a task is cancelled."""

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
    The tasks that wait. Methods may be called from any thread.

    A deque would have to be searched for a cancelled task, or keep it, with its arguments, until
    the workers reach it. With a GIL there is no lock: each step that changes the entries is a
    single one, and so atomic.
    """

    def __init__(self) -> None:
        self._records: OrderedDict[str, RecordT] = OrderedDict()

    def append(self, record: RecordT) -> None:
        """Put a task at the end."""
        self._records[record.id] = record

    def appendleft(self, record: RecordT) -> None:
        """Put a task back to the front."""
        self._records[record.id] = record
        try:
            self._records.move_to_end(record.id, last=False)
        except KeyError:
            return  # Another thread has taken or discarded it between the two steps.

    def popleft(self) -> RecordT:
        """Take out the first task. Raises IndexError when there is none, as a deque does."""
        try:
            return self._records.popitem(last=False)[1]
        except KeyError:
            raise IndexError("The queue is empty.") from None

    def discard(self, record: RecordT) -> None:
        """Take out this task, if it is there."""
        self._records.pop(record.id, None)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[RecordT]:
        """Iterate over a copy, which is made in one step."""
        return iter(list(self._records.values()))


class LockedTaskQueue[RecordT: TaskRecord](TaskQueue[RecordT]):
    """
    The same for builds without a GIL, where an OrderedDict is not safe between threads.

    Copying one while another thread changed it crashed CPython 3.13t. With a GIL the lock would
    only cost: a thread that loses the GIL while it holds the lock makes all others queue behind it.
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
    def __iter__(self) -> Iterator[RecordT]:
        with self._lock:
            return super().__iter__()


def make_queue[RecordT: TaskRecord]() -> TaskQueue[RecordT]:
    """Return the kind of queue that is right for this build of Python."""
    has_gil = getattr(sys, "_is_gil_enabled", lambda: True)()
    return TaskQueue() if has_gil else LockedTaskQueue()
