"""How many tasks wait before each waiting task, published when they move up."""

from __future__ import annotations

import threading
import time
from itertools import islice
from typing import TYPE_CHECKING

from ..ticker import ticker as default_ticker

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from ..record import TaskRecord
    from ..ticker import Ticker

INTERVAL_SECONDS = 1.0  # from one scan of the queue to the next, at least
MAX_CPU_SHARE = 0.05  # of the time may be spent on scans, however many tasks wait
TASKS_PER_SLICE = 500  # some milliseconds of work: the ticker's thread has other duties


class Positions:
    """
    Publishes the positions of the tasks in a queue when they have moved up.

    A thread that changes the queue calls schedule(), which costs next to nothing; at most once in
    INTERVAL_SECONDS the ticker's thread scans the queue. Nothing runs while the queue does not
    change. A published position never increases, even when a task is put back at the front or other
    threads enqueue concurrently. A task of the queue that is not in `unfinished` was cancelled and
    does not count; `count_ahead` returns the number of tasks that wait outside of the queue,
    before all tasks in it.
    """

    def __init__(
        self,
        queue: Iterable[TaskRecord],
        unfinished: Container[str],
        *,
        count_ahead: Callable[[], int] = int,
        clock: Callable[[], float] = time.monotonic,
        ticker: Ticker | None = None,
    ) -> None:
        self._queue = queue
        self._unfinished = unfinished
        self._count_ahead = count_ahead
        self._clock = clock
        self._ticker = ticker or default_ticker
        # Unlocked: a scan resets it before it copies the queue, so the scan sees every change that
        # found it set, and a later change sets it again.
        self.has_moved = False
        # Guards the two below: the ticker has this object once, or not at all.
        self._lock = threading.RLock()
        self._is_scheduled = False
        self._next_scan_at = 0.0
        # Only the ticker's thread touches these, during a scan.
        self._scan: Iterator[TaskRecord] | None = None
        self._place = 0

    def schedule(self) -> None:
        """Have the queue scanned when it is time to, because it has changed. From any thread."""
        if self.has_moved:
            return
        self.has_moved = True
        with self._lock:
            if self._is_scheduled:
                return
            self._is_scheduled = True
        self._ticker.add(self, self._next_scan_at)

    def tick(self) -> float | None:
        """
        Publish the next positions that have changed; return when to continue, or None.

        Called in the ticker's thread.
        """
        try:
            return self._scan_slice()
        except Exception:
            self._scan = None
            self.has_moved = False  # So that the next schedule() starts a new scan.
            with self._lock:
                self._is_scheduled = False
            raise

    def _scan_slice(self) -> float | None:
        began = self._clock()
        if self._scan is None:
            self.has_moved = False
            self._scan, self._place = iter(list(self._queue)), self._count_ahead()
            self._next_scan_at = began + INTERVAL_SECONDS
        records = list(islice(self._scan, TASKS_PER_SLICE))
        for record in records:
            if record.id in self._unfinished:
                record.move_up(self._place)
                self._place += 1
        now = self._clock()
        continue_at = now + (now - began) * (1 / MAX_CPU_SHARE - 1)
        if len(records) == TASKS_PER_SLICE:
            return continue_at
        self._scan = None
        with self._lock:
            self._next_scan_at = max(self._next_scan_at, continue_at)
            self._is_scheduled = self.has_moved
            return self._next_scan_at if self._is_scheduled else None
