"""The unfinished tasks of a pool, and the threads that wait for their end."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..record import TaskRecord


class UnfinishedTasks[RecordT: TaskRecord]:
    """
    The tasks without an outcome that is fully processed. Methods may be called from any thread.

    Each entry is added once and removed once, which is atomic, so no lock is shared by all tasks.
    """

    def __init__(self) -> None:
        self._records: dict[str, RecordT] = {}
        self._has_ended = threading.Condition()
        self._waiters = 0  # threads that wait for `_has_ended`, which guards this

    def add(self, record: RecordT) -> None:
        """Add a new task."""
        self._records[record.id] = record

    def remove(self, record: RecordT) -> None:
        """Remove a task whose receivers of task_finished have returned."""
        del self._records[record.id]
        # Unlocked: a thread that starts to wait after this point finds that the task is gone.
        if self._waiters:
            with self._has_ended:
                self._has_ended.notify_all()

    def get(self, id: str) -> RecordT | None:
        """Return a task, or None."""
        return self._records.get(id)

    def records(self) -> list[RecordT]:
        """Return all of them."""
        return list(self._records.values())

    def wait_until_empty(self, timeout: float) -> list[RecordT]:
        """Wait until there is none; return those that are left after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._has_ended:
            self._waiters += 1
            try:
                while self._records and (left := deadline - time.monotonic()) > 0:
                    self._has_ended.wait(left)
            finally:
                self._waiters -= 1
        return self.records()

    def __contains__(self, id: object) -> bool:
        return id in self._records
