"""ResultStore keeps the records of one pool in memory and bounds their number."""

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
    Stores the unfinished and the last finished records of one pool, in memory.

    Methods may be called from any thread. The store needs no lock for `_records` and `_finished`,
    because each change of them is one atomic operation of a dict or a deque.
    """

    def __init__(self, *, alias: str, max_results: int, max_unfinished: int | None) -> None:
        self._alias = alias
        self._max_results = max_results
        self._max_unfinished = max_unfinished
        self._records: dict[str, TaskRecord] = {}
        self._finished: deque[TaskRecord] = deque()
        # At most one thread evicts; others skip eviction instead of waiting.
        self._evicting = threading.Lock()
        # The records without an outcome; empty if `max_unfinished` is None. TaskRecord removes
        # itself from this set when succeed() or fail() records its outcome.
        self._unfinished: set[TaskRecord] = set()
        # Guards the comparison with `max_unfinished`: without it two threads could both take the
        # last free place. It is re-entrant, because a finalizer may enqueue a task while its
        # thread holds this lock.
        self._limit_lock = threading.RLock()

    def add(self, record: TaskRecord) -> None:
        """Store a new record. Raises QueueFull if `max_unfinished` records have no outcome."""
        if self._max_unfinished is not None:
            self._count(record, self._max_unfinished)
        self._records[record.id] = record

    def make_evictable(self, record: TaskRecord) -> list[TaskRecord]:
        """Mark a finished record as evictable; return the records evicted beyond MAX_RESULTS."""
        finished = self._finished
        finished.append(record)
        if len(finished) <= self._max_results:
            return []
        evicted: list[TaskRecord] = []
        # A thread that does not get `_evicting` need not evict: the thread that has it checks the
        # number of finished records again after it has released the lock. Without a GIL that check
        # may read an old number; then the next finished record evicts one more.
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
        """Return the number of stored records, including those of unfinished tasks."""
        return len(self._records)

    def records(self) -> list[TaskRecord]:
        """Return a list of all stored records."""
        return list(self._records.values())

    def get(self, result_id: str) -> TaskRecord:
        """Return the record with this id. Raises TaskResultDoesNotExist for an unknown id."""
        record = self._records.get(result_id)
        if record is None:
            raise TaskResultDoesNotExist(
                f"The task backend {self._alias!r} has no result {result_id!r}: no such task was "
                f"enqueued in this process since its start, or later results have evicted it "
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
