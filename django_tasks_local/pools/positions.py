"""Positions publishes how many tasks wait before each waiting task, when this number shrinks."""

from __future__ import annotations

import threading
from itertools import islice
from typing import TYPE_CHECKING

from ..clocks import Clocks
from ..ticker import ticker as default_ticker

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from ..record import TaskRecord
    from ..ticker import Ticker

INTERVAL_SECONDS = 1.0  # At least this time passes between the starts of two scans of the queue.
MAX_CPU_SHARE = 0.05  # Scans take at most this share of one CPU's time, however many tasks wait.
# A scan visits this many tasks per call of tick(), so that the call takes only some milliseconds:
# the ticker's thread also samples the progress of tasks.
TASKS_PER_SLICE = 500


class Positions:
    """
    Publishes the positions of the tasks in a queue when they have moved up.

    A thread that changes the queue calls schedule(), which only checks a flag if a scan is pending
    already. The ticker's thread scans the queue at most once in INTERVAL_SECONDS, and never while
    the queue does not change. A published position never increases, even when a task is put back at
    the front or other threads enqueue concurrently. A task of the queue that is not in `unfinished`
    was cancelled and does not count. `count_ahead` returns the number of tasks that wait outside of
    the queue, before all tasks in it.
    """

    def __init__(
        self,
        queue: Iterable[TaskRecord],
        unfinished: Container[str],
        *,
        count_ahead: Callable[[], int] = int,
        clock: Callable[[], float] = Clocks.monotonic,
        ticker: Ticker | None = None,
    ) -> None:
        self._queue = queue
        self._unfinished = unfinished
        self._count_ahead = count_ahead
        self._clock = clock
        self._ticker = ticker or default_ticker
        # True if the queue has changed since the last scan copied it. No lock guards this flag: a
        # scan resets it before it copies the queue. A thread that finds it set changed the queue
        # before that copy; a thread that finds it reset sets it again.
        self.has_moved = False
        # Guards `_is_scheduled`, so that the ticker has at most one entry for this object.
        self._lock = threading.RLock()
        self._is_scheduled = False
        self._next_scan_at = 0.0
        # Only the ticker's thread uses `_scan` and `_place`: the tasks that the scan has not
        # visited yet, and the position of the next one.
        self._scan: Iterator[TaskRecord] | None = None
        self._place = 0

    def schedule(self) -> None:
        """
        Schedule a scan of the queue, which has changed. May be called from any thread.

        The scan starts INTERVAL_SECONDS after the start of the last one, or later if that was slow.
        """
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
        Scan up to TASKS_PER_SLICE tasks and publish their changed positions.

        Returns the time.monotonic() of the next call, or None if no scan is needed. The ticker's
        thread calls this.
        """
        try:
            return self._scan_slice()
        except Exception:
            self._scan = None
            with self._lock:
                # Both are reset under the lock: if schedule() set `has_moved` and found
                # `_is_scheduled` set, the flag would stay set, and no thread would start a scan.
                self.has_moved = False
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
