"""PoolStatistics has the counts of a pool, which are read one after the other, without a lock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from ..record import READY, RUNNING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import datetime

    from ..record import TaskRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """Counts of one pool: its workers, its waiting and running tasks, and its stored results."""

    workers: int
    waiting: int
    running: int
    # Tasks that wait, that run, or whose task_finished receivers have not returned yet.
    unfinished: int
    # The earliest time at which one of the waiting tasks was enqueued; None if no task waits.
    oldest_waiting: datetime | None
    # Results in the store, including those of unfinished tasks.
    results: int

    @classmethod
    def of(cls, unfinished: Sequence[TaskRecord], workers: int, results: int) -> Self:
        """Return the counts of a pool with these unfinished tasks."""
        tasks = [(record.status, record.enqueued_at) for record in unfinished]
        waiting = [enqueued_at for status, enqueued_at in tasks if status is READY]
        return cls(
            workers=workers,
            waiting=len(waiting),
            running=sum(status is RUNNING for status, _ in tasks),
            unfinished=len(tasks),
            oldest_waiting=min(waiting, default=None),
            results=results,
        )
