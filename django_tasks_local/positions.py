"""How many tasks wait before each waiting task, told to the hub when they move up."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from .events import EventKind
from .hub import hub
from .ticker import ticker as default_ticker

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Iterable, Iterator

    from .queues import Waiting
    from .ticker import Ticker

INTERVAL = 1.0  # seconds from one look at the queue to the next, at least
SHARE = 0.05  # of the time may be spent in this, however many tasks wait
SLICE = 500  # tasks in one go, which is some milliseconds: the sampler has other work


class Positions:
    """
    Publishes the positions of the tasks in a queue, when they have moved up.

    Whoever changes the queue calls look(), which costs next to nothing; at most once in INTERVAL
    the ticker's thread walks through the queue. Nothing runs while the queue does not change. A
    position that was told never rises: who is put back to the front of the queue pushes nobody
    back, nor do tasks that other threads enqueue in the same moment. A job of the queue that is not
    in `unfinished` was cancelled and does not count.
    """

    def __init__(
        self,
        queue: Iterable[Waiting],
        unfinished: Container[str],
        *,
        clock: Callable[[], float] = time.monotonic,
        ticker: Ticker = default_ticker,
    ) -> None:
        self._queue = queue
        self._unfinished = unfinished
        self._clock = clock
        self._ticker = ticker
        # Unlocked: it is taken back before the queue is looked at, so what has changed by then is
        # seen, and what changes later sets it again.
        self._moved = False
        # Guards what follows: the sampler has this in its list once, or not at all.
        self._lock = threading.Lock()
        self._scheduled = False
        self._next_at = 0.0
        # Only the ticker's thread touches these, in the midst of a walk.
        self._walk: Iterator[Waiting] | None = None
        self._place = 0

    def look(self) -> None:
        """Look at the queue when it is time to, because it has changed. Called from any thread."""
        if self._moved:
            return
        self._moved = True
        with self._lock:
            if self._scheduled:
                return
            self._scheduled = True
        self._ticker.add(self, self._next_at)

    def tick(self) -> float | None:
        """
        Publish the next positions that have changed; return when to go on, or None.

        Called in the ticker's thread.
        """
        try:
            return self._go_on()
        except Exception:
            self._walk = None
            with self._lock:
                self._scheduled = False  # The next look() begins anew.
            raise

    def _go_on(self) -> float | None:
        began = self._clock()
        if self._walk is None:
            self._moved = False
            # The copy is made in one step, as everything else happens to a queue.
            self._walk, self._place = iter(list(self._queue)), 0
            self._next_at = began + INTERVAL
        jobs = list(islice(self._walk, SLICE))
        for job in jobs:
            if job.result_id in self._unfinished:
                self._tell(job, self._place)
                self._place += 1
        now = self._clock()
        go_on_at = now + (now - began) * (1 / SHARE - 1)
        if len(jobs) == SLICE:
            return go_on_at
        self._walk = None
        with self._lock:
            self._next_at = max(self._next_at, go_on_at)
            self._scheduled = self._moved
            return self._next_at if self._scheduled else None

    def _tell(self, job: Waiting, position: int) -> None:
        if position >= job.position:
            return
        event = hub.snapshot(job.result_id)
        if event is not None and event.kind is EventKind.ENQUEUED:
            job.position = position
            hub.amend(replace(event, position=position))
