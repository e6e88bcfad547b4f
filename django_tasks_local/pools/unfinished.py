"""UnfinishedTasks has the unfinished tasks of a pool and lets threads wait for their end."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from ..clocks import Clocks
from ..waiting import limit_wait

if TYPE_CHECKING:
    from ..record import TaskRecord


class UnfinishedTasks[RecordT: TaskRecord]:
    """
    Contains each task from enqueue() until its task_finished receivers have returned.

    Methods may be called from any thread. Adding and removing an entry are atomic operations of a
    dict, so threads share a lock only while one of them waits in wait_until_empty().
    """

    def __init__(self) -> None:
        self._records: dict[str, RecordT] = {}
        self._has_ended = threading.Condition()
        self._waiters = 0  # The number of threads in wait_until_empty(); `_has_ended` guards it.

    def add(self, record: RecordT) -> None:
        """Add a new task."""
        self._records[record.id] = record

    def remove(self, record: RecordT) -> None:
        """Remove a task whose receivers of task_finished have returned."""
        del self._records[record.id]
        # Reading `_waiters` needs no lock: a thread that starts to wait after this point no longer
        # finds the task in its copy of `_records`.
        if self._waiters:
            with self._has_ended:
                self._has_ended.notify_all()

    def get(self, id: str) -> RecordT | None:
        """Return the unfinished task with this id, or None if there is none."""
        return self._records.get(id)

    def records(self) -> list[RecordT]:
        """Return a list of all unfinished tasks."""
        return list(self._records.values())

    def wait_until_empty(self, timeout: float) -> list[RecordT]:
        """Wait until no task is unfinished; return the tasks left after `timeout` seconds."""
        deadline = Clocks.monotonic() + timeout
        with self._has_ended:
            self._waiters += 1
            try:
                # The copy locks the dict, as remove() does, also without a GIL: either it lacks
                # the removed task, or remove() reads the new `_waiters`. len() orders nothing.
                is_empty = not self.records()
                while not is_empty and (left := deadline - Clocks.monotonic()) > 0:
                    self._has_ended.wait(limit_wait(left))
                    is_empty = not self._records
            finally:
                self._waiters -= 1
        return self.records()

    def __contains__(self, id: object) -> bool:
        return id in self._records
