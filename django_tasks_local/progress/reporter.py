"""
Keep the progress of one task, and publish samples of it at most once per interval.

    a thread of the task                       the ticker's thread
    --------------------                       -------------------
    report_progress()                          Reporter.tick()
      Reporter.report() -- publish(1, ...)       publish(2, ...) the latest values
                        -- ticker.add() ------>
    track() counts in LoopProgress.current <---- reads it

This module depends neither on the hub nor on a worker's socket: the Reporter passes each sample
to a function `publish`, which its creator supplies.
"""

from __future__ import annotations

import math
import threading
from abc import abstractmethod
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from ..cancellation import Cancellation
from ..clocks import Clocks
from ..events import Progress
from ..forking import reset_in_child
from ..logs import get_logger
from ..ticker import Ticker
from ..ticker import ticker as default_ticker
from .loops import Loops
from .rate import seconds_left
from .values import UNSET, Unset

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..aliases import Number
    from .loops import LoopProgress, Shown

logger = get_logger(__name__)

# get() returns the id of the running task's result; outside of a task it raises LookupError.
current_result_id: ContextVar[str] = ContextVar("current_result_id")

PROGRESS_INTERVAL = 0.05  # seconds between samples of a task of another backend
MIN_TRACK_INTERVAL = 0.005  # the least number of seconds between samples of a track() loop


type _Values = tuple[Shown, dict[str, Any]]


class Reporter:
    """
    Keeps the values that one task reported last; publishes at most one sample in each interval.

    The last values are always published, by the ticker or by the caller of close().
    `publish(number, progress)` receives samples with the numbers 1, 2, 3, ... Two threads may call
    it concurrently; the sample with the lower number is older. `publish` must not block.

    A finalizer or a signal handler may report while the same thread is inside a method of the
    Reporter. So the lock is reentrant, and a method assumes after each function that it calls that
    any other method has run in between.
    """

    __slots__ = (
        "_clock",
        "_closed",
        "_data",
        "_innermost",
        "_lock",
        "_loops",
        "_next_at",
        "_number",
        "_publish",
        "_published",
        "_queued",
        "_ticker",
        "_warned",
        "cancellation",
        "interval",
    )

    def __init__(
        self,
        publish: Callable[[int, Progress], object],
        interval: float,
        cancellation: Cancellation,
        *,
        clock: Callable[[], float] = Clocks.monotonic,
        ticker: Ticker = default_ticker,
        lock: threading.RLock | None = None,
    ) -> None:
        self.interval = interval
        self.cancellation = cancellation
        self._publish = publish
        self._clock = clock
        self._ticker = ticker
        # Guards: the attributes below. No thread holds the lock while it calls `publish`. The
        # reporter uses the task's lock: with a lock each, finalizers in two threads could take
        # the two locks in opposite orders and deadlock.
        self._lock = lock or threading.RLock()
        self._closed = False
        self._queued = False  # True while the ticker has this reporter in its queue.
        self._warned = False  # True after a warning about data that was dropped.
        self._data: dict[str, Any] = {}
        self._loops = Loops()
        # Repeats `_loops.innermost`, because looking that up takes 3 % of the time of a report().
        self._innermost = self._loops.innermost
        self._number = 0
        self._next_at = -math.inf
        self._published: _Values | None = None

    def report(
        self,
        current: Number | Unset | None = UNSET,
        total: Number | Unset | None = UNSET,
        message: str | Unset = UNSET,
        unit: str | Unset = UNSET,
        data: dict[str, Any] | Unset = UNSET,
    ) -> None:
        """
        Store checked values. Publish a sample, or have the ticker publish it after the interval.

        Raises TaskCancelled, once, after the task was cancelled.
        """
        if self.cancellation.requested:
            self.cancellation.raise_if_requested()
        sample = None
        with self._lock:
            if not self._closed:
                loop = self._innermost
                if current is not UNSET:
                    loop.current = current
                if total is not UNSET:
                    loop.total = total
                if message is not UNSET:
                    loop.message = message
                if unit is not UNSET:
                    loop.unit = unit
                if data is not UNSET:
                    self._data = data
                if self._queued:
                    return
                now = self._clock()
                if now < self._next_at or self._closed:
                    self._queue_locked()
                    return
                sample = self._sample_locked(now)
        if sample is not None:
            self._publish(*sample)
            return
        # Log without the lock: a log handler may report the progress of another task.
        logger.debug(
            "Task id=%s reported progress after it was finished; the report is ignored.",
            current_result_id.get(None),
        )

    def tick(self) -> float | None:
        """
        Publish a sample if a value has changed; return the time of the next call, or None.

        Called from: the ticker's thread.
        """
        with self._lock:
            if self._closed:
                return None
            self._queued = bool(self._loops)
            now = self._clock()
            again_at = now + max(self.interval, MIN_TRACK_INTERVAL) if self._queued else None
            if self._values() == self._published:
                return again_at
            number, progress = self._sample_locked(now)
        try:
            self._publish(number, progress)
        except Exception:
            # Return normally although `publish` has a bug, so that the ticker calls tick() again.
            logger.exception("A sample of a task's progress could not be published.")
        return again_at

    def close(self) -> tuple[int, Progress | None]:
        """Stop publishing; return the last sample's number and the final Progress, if any."""
        with self._lock:
            self._closed = True
            # After a `break` in an `async for`, asyncio may close the track() generator later.
            self._loops.end_all()
            self._innermost = self._loops.innermost
            if self._published is None:
                return self._number, None
            return self._number, self._progress(self._values(), self._clock())

    def warn_of_dropped_data(self, dropped: str) -> None:
        """Log, once for the task, which values of its data were dropped, and why."""
        with self._lock:
            if self._warned:
                return
            self._warned = True
        logger.warning(
            "Task id=%s reported data that cannot be encoded as JSON. These values are dropped, as "
            "are later ones without another warning: %s",
            current_result_id.get(None),
            dropped,
        )

    def start_tracking(self, loop: LoopProgress) -> None:
        """Begin a track() loop: until it ends, the ticker samples its count in each interval."""
        if self.cancellation.requested:
            self.cancellation.raise_if_requested()
        with self._lock:
            if not self._closed:
                self._loops.begin(loop, self._clock())
                self._innermost = self._loops.innermost
        self.report()
        with self._lock:
            if not self._closed:
                self._queue_locked()

    def stop_tracking(self, loop: LoopProgress) -> None:
        """End a track() loop, if it has begun; the ticker publishes the loop's last count."""
        with self._lock:
            self._loops.end(loop)
            self._innermost = self._loops.innermost

    def _queue_locked(self) -> None:
        if not self._queued:
            self._queued = True
            self._ticker.add(self, self._next_at)

    def _values(self) -> _Values:
        return self._loops.shown(), self._data

    def _sample_locked(self, now: float) -> tuple[int, Progress]:
        self._next_at = now + self.interval
        # Take the number before the values: a report() that interrupts the next line takes a
        # higher number, and its values are as new or newer.
        self._number = number = self._number + 1
        self._published = values = self._values()
        return number, self._progress(values, now)

    def _progress(self, values: _Values, now: float) -> Progress:
        (loop, current, total, percent, message, unit, levels), data = values
        rate = loop.rate.update(current, now)
        return Progress(
            current=current,
            total=total,
            percent=percent,
            message=message,
            unit=unit,
            data=data,
            levels=levels,
            rate=rate,
            eta=seconds_left(current, total, rate),
        )


class Reporting(Protocol):
    """
    Defines what report_progress() and track() need to know of the running task.

    The record of a task inherits from this class. It makes the Reporter and the Cancellation at
    their first use, because most tasks report nothing.
    """

    __slots__ = ()

    id: str
    lock: threading.RLock  # guards `reporter`, `cancellation` and the state of the reporter
    interval: float  # the least number of seconds between two samples
    reporter: Reporter | None
    cancellation: Cancellation | None

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Return whether the task's end was recorded, after which reports have no effect."""

    @abstractmethod
    def report(self, number: int, progress: Progress) -> object:
        """Publish a sample of the progress. Called from: any thread, as Reporter's `publish`."""

    def get_reporter(self) -> Reporter:
        """Return the task's reporter; make it at the first call. Called from: any thread."""
        with self.lock:
            if self.reporter is None:
                reporter = Reporter(
                    self.report, self.interval, self.get_cancellation(), lock=self.lock
                )
                if self.is_finished:
                    reporter.close()
                # A finalizer that ran during the lines above may have made a reporter: keep it.
                if self.reporter is None:
                    self.reporter = reporter  # type: ignore[misc] # a slot of the subclass
            return self.reporter

    def get_cancellation(self) -> Cancellation:
        """Return the task's cancellation; make it at the first call. Called from: any thread."""
        with self.lock:
            if self.cancellation is None:
                cancellation = Cancellation()
                # A finalizer that ran during the line above may have made a cancellation: keep it.
                if self.cancellation is None:
                    self.cancellation = cancellation  # type: ignore[misc]
            return self.cancellation

    def close_progress(self) -> tuple[int, Progress | None]:
        """Stop publishing; return the last sample's number and the final Progress, if any."""
        return (0, None) if self.reporter is None else self.reporter.close()


current_reporting: ContextVar[Reporting | None] = ContextVar("current_reporting")


@reset_in_child
def _leave_task() -> None:
    # A child of fork() is outside of the task: no report of the child can reach the parent's hub,
    # and the child could wait without end for a lock that another thread held at the fork.
    current_reporting.set(None)
