"""The bounded store of the records of one pool, in memory."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from django.tasks.exceptions import TaskResultDoesNotExist

from ..exceptions import QueueFull

if TYPE_CHECKING:
    from ..record import TaskRecord


class ResultStore:
    """
    The records of one pool. Methods may be called from any thread.

    There is no lock for the whole store: every change of `_records` and `_finished` is a single
    step, which is atomic.
    """

    def __init__(self, *, alias: str, max_results: int, max_unfinished: int | None) -> None:
        self._alias = alias
        self._max_results = max_results
        self._max_unfinished = max_unfinished
        self._records: dict[str, TaskRecord] = {}
        self._finished: deque[TaskRecord] = deque()
        # At most one thread evicts; others skip eviction instead of waiting.
        self._evicting = threading.Lock()
        # Filled only if there is a limit. A record leaves it in the step that finishes it.
        self._unfinished: set[TaskRecord] = set()
        # Guards the comparison with the limit: two threads could both find the last free place.
        # Re-entrant, because a finalizer may enqueue a task while this thread holds it.
        self._limit_lock = threading.RLock()

    def add(self, record: TaskRecord) -> None:
        """Store a new record. Raises QueueFull."""
        if self._max_unfinished is not None:
            self._count(record, self._max_unfinished)
        self._records[record.id] = record

    def make_evictable(self, record: TaskRecord) -> list[TaskRecord]:
        """Mark a published result as evictable; return those evicted to stay within MAX_RESULTS."""
        finished = self._finished
        finished.append(record)
        if len(finished) <= self._max_results:
            return []
        evicted: list[TaskRecord] = []
        # A thread that cannot evict leaves it to the one that does, which checks again.
        while len(finished) > self._max_results and self._evicting.acquire(blocking=False):
            try:
                while len(finished) > self._max_results:
                    oldest = finished.popleft()
                    del self._records[oldest.id]
                    evicted.append(oldest)
            finally:
                self._evicting.release()
        return evicted

    def __len__(self) -> int:
        """Return the number of results."""
        return len(self._records)

    def records(self) -> list[TaskRecord]:
        """Return all records."""
        return list(self._records.values())

    def get(self, result_id: str) -> TaskRecord:
        """Return a record. Raises TaskResultDoesNotExist."""
        record = self._records.get(result_id)
        if record is None:
            raise TaskResultDoesNotExist(
                f"The task backend {self._alias!r} has no result {result_id!r}: it was never "
                f"here, was lost in a restart, or made room for later ones "
                f"(MAX_RESULTS = {self._max_results})."
            )
        return record

    def _count(self, record: TaskRecord, limit: int) -> None:
        with self._limit_lock:
            unfinished = len(self._unfinished)
            if unfinished >= limit:
                raise QueueFull(
                    f"The queue of the task backend {self._alias!r} is full: {unfinished} tasks "
                    f"run or wait. Task {record.path} was not enqueued; try again later, "
                    f"or raise MAX_PENDING or MAX_WORKERS in its OPTIONS."
                )
            record.unfinished = self._unfinished
            self._unfinished.add(record)
