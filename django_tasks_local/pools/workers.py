"""PoolOfWorkers declares what distinguishes a thread pool from a process pool: the workers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..aliases import AnyTask
    from ..context import Carried
    from ..execution import Outcome
    from ..record import TaskRecord


class PoolOfWorkers[RecordT: TaskRecord](ABC):
    """Declares the methods with which a Pool uses its workers."""

    @abstractmethod
    def _make_record(
        self, task: AnyTask, args: list[Any], kwargs: dict[str, Any], carried: Carried | None
    ) -> RecordT:
        """
        Return the record of a new task; enqueue() calls this in its caller's thread.

        Raises an exception if the task cannot be enqueued; enqueue() has stored nothing yet.
        """

    @abstractmethod
    def _submit(self, record: RecordT) -> None:
        """Put a task into the queue; enqueue() calls this in its caller's thread."""

    @abstractmethod
    def _stop(self, record: RecordT) -> None:
        """Stop a task that a worker has begun. May be called from any thread."""

    @abstractmethod
    def _close_workers(self) -> None:
        """End idle workers, and stop busy ones if possible."""

    @abstractmethod
    def count_workers(self) -> int:
        """Return the number of workers, including those that are starting or ending."""

    def waiting_in_workers(self) -> int:
        """Return how many tasks were assigned to workers but not begun; they precede the queue."""
        return 0

    @abstractmethod
    def _send_started(self, record: RecordT) -> None:
        """Call the receivers of task_started, or have the notifier call them."""

    @abstractmethod
    def _send_finished(self, record: RecordT, outcome: Outcome) -> None:
        """Send task_finished for a task that a worker has begun, as _send_started() has sent."""
