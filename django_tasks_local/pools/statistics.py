"""The counts of a pool at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datetime import datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStatistics:
    """Counts of one pool: its workers, its waiting and running tasks, and its results."""

    workers: int
    waiting: int
    running: int
    # Waiting, running, or finished with receivers of task_finished that have not returned.
    unfinished: int
    # When the first task of the queue was enqueued; None if none waits.
    oldest_waiting: datetime | None
    results: int
