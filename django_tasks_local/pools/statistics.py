"""PoolStatistics has the counts of a pool, which are read one after the other, without a lock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """Counts of one pool: its workers, its waiting and running tasks, and its stored results."""

    workers: int
    waiting: int
    running: int
    # Tasks that wait, that run, or whose task_finished receivers have not returned yet.
    unfinished: int
    # The time at which the first task of the queue was enqueued; None if the queue is empty.
    oldest_waiting: datetime | None
    # Results in the store, including those of unfinished tasks.
    results: int
