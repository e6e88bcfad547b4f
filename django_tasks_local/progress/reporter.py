"""
The progress of one task: the values reported last, throttled samples of them, the open loops.

    a thread of the task                       the ticker's thread
    --------------------                       -------------------
    report_progress()                          Reporter.tick()
      Reporter.report() -- publish(1, ...)       publish(2, ...) the values held back
                        -- ticker.add() ------>
    track() counts in LoopProgress.current <---- reads it

This module knows neither the hub nor a pipe: a sample goes to the function `publish`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import abstractmethod
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from ..aliases import Number
from ..cancellation import Cancellation
from ..events import Progress
from ..forking import reset_in_child
from ..ticker import Ticker
from ..ticker import ticker as default_ticker
from .rate import Rate, percent_of, seconds_left
from .values import UNSET, Unset

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

# Inside a task: the id of its result. Outside of one, get() raises LookupError.
current_result_id: ContextVar[str] = ContextVar("current_result_id")

PROGRESS_INTERVAL = 0.05  # seconds; for tasks whose backend has no such option
MIN_TRACK_INTERVAL = 0.005  # seconds; with PROGRESS_INTERVAL 0 track() is sampled this often


class LoopProgress:
    """
    The count, total, message and rate of one track() loop, or of a task outside of loops.

    Guarded by the reporter's lock, except for `current` and `total`: a track() loop stores them
    without the lock, and the reporter reads each as a whole.
    """

    __slots__ = ("current", "first_message", "message", "rate", "total")

    def __init__(self, current: Number | None, total: Number | None) -> None:
        self.current = current
        self.total = total
        self.message = self.first_message = ""
        self.rate = Rate()

    def start(self, message: str, now: float) -> None:
        """Begin a loop, with the message that it is given or that is shown already."""
        self.message = self.first_message = message
        self.rate.start(now)


type _Values = tuple[Number | None, Number | None, str, dict[str, Any]]


class Reporter:
    """
    Keeps the values that one task reported last; publishes at most one sample in each interval.

    The last values are always published. `publish(number, progress)` gets samples numbered 1, 2,
    3, ... and may get them from two threads at once; the lower number is then the older sample.
    It must not block.

    A finalizer or a signal handler may report while the same thread is inside a method. So the
    lock is reentrant, and after each call in a method the code assumes that any other method has
    run in between.
    """

    __slots__ = (
        "_clock",
        "_closed",
        "_data",
        "_lock",
        "_loops",
        "_next_at",
        "_number",
        "_outermost",
        "_publish",
        "_published",
        "_queued",
        "_shown",
        "_ticker",
        "cancellation",
        "interval",
    )

    def __init__(
        self,
        publish: Callable[[int, Progress], object],
        interval: float,
        cancellation: Cancellation,
        *,
        clock: Callable[[], float] = time.monotonic,
        ticker: Ticker = default_ticker,
        lock: threading.RLock | None = None,
    ) -> None:
        self.interval = interval
        self.cancellation = cancellation
        self._publish = publish
        self._clock = clock
        self._ticker = ticker
        # Guards the attributes below. Not held while a sample is published. It is the lock of the
        # task: with two locks, finalizers in two threads could take them in opposite orders.
        self._lock = lock or threading.RLock()
        self._closed = False
        self._queued = False  # The ticker has this reporter, once.
        self._data: dict[str, Any] = {}
        self._loops: list[LoopProgress] = []  # the open track() loops, the newest one last
        # Where reports go, and where they go again after the last loop has ended.
        self._shown = self._outermost = LoopProgress(None, 100)
        self._number = 0
        self._next_at = -math.inf
        self._published: _Values | None = None

    def report(
        self,
        current: Number | Unset | None = UNSET,
        total: Number | Unset | None = UNSET,
        message: str | Unset = UNSET,
        data: dict[str, Any] | Unset = UNSET,
    ) -> None:
        """
        Store checked values, and publish a sample now or have the ticker do it when it is due.

        Raises TaskCancelled, once, after the task was cancelled.
        """
        if self.cancellation.requested:
            self.cancellation.raise_if_requested()
        sample = None
        with self._lock:
            if not self._closed:
                shown = self._shown
                if current is not UNSET:
                    shown.current = current
                if total is not UNSET:
                    shown.total = total
                if message is not UNSET:
                    shown.message = message
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
        # Outside of the lock: a log handler may report the progress of another task.
        logger.debug(
            "Task id=%s reported progress after it was finished; it is ignored.",
            current_result_id.get(None),
        )

    def tick(self) -> float | None:
        """
        Publish a sample if a value has changed; return when to be called again, or None.

        Called in the ticker's thread.
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
            # The ticker must call this reporter again, although its `publish` has a bug.
            logger.exception("A sample of a task's progress could not be published.")
        return again_at

    def close(self) -> tuple[int, Progress | None]:
        """Stop publishing; return the last sample's number and the final state, if there is one."""
        with self._lock:
            self._closed = True
            if self._loops:  # asyncio may not yet have closed a loop that was left early.
                self._show_locked(self._outermost)
            if self._published is None:
                return self._number, None
            return self._number, self._progress(self._values(), self._clock())

    def start_tracking(self, loop: LoopProgress, message: str | Unset) -> None:
        """Begin a track() loop: until it ends the ticker samples its count in each interval."""
        if self.cancellation.requested:
            self.cancellation.raise_if_requested()
        with self._lock:
            if not self._closed:
                loop.start(self._shown.message if message is UNSET else message, self._clock())
                if not self._loops:
                    self._outermost = loop
                self._loops.append(loop)
                self._shown = loop
        self.report()
        with self._lock:
            if not self._closed:
                self._queue_locked()

    def stop_tracking(self, loop: LoopProgress) -> None:
        """
        End a track() loop, if it has begun; the ticker samples its last value.

        The loop around it is shown again, with its own message, unless the task has reported
        another message in this loop. Loops may end in any order: those of coroutines overlap.
        """
        with self._lock:
            if loop not in self._loops:
                return
            self._loops.remove(loop)
            if self._shown is loop:
                self._show_locked(self._loops[-1] if self._loops else self._outermost)

    def _queue_locked(self) -> None:
        if not self._queued:
            self._queued = True
            self._ticker.add(self, self._next_at)

    def _show_locked(self, outer: LoopProgress) -> None:
        if self._shown.message is not self._shown.first_message:
            outer.message = self._shown.message
        self._shown = outer

    def _values(self) -> _Values:
        shown = self._shown
        return shown.current, shown.total, shown.message, self._data

    def _sample_locked(self, now: float) -> tuple[int, Progress]:
        self._next_at = now + self.interval
        # The number first: a report that interrupts this line takes a higher number, and its
        # values are newer or the same.
        self._number = number = self._number + 1
        self._published = values = self._values()
        return number, self._progress(values, now)

    def _progress(self, values: _Values, now: float) -> Progress:
        current, total, message, data = values
        rate = self._shown.rate.update(current, now)
        return Progress(
            current=current,
            total=total,
            percent=percent_of(current, total),
            message=message,
            data=data,
            rate=rate,
            eta=seconds_left(current, total, rate),
        )


class Reporting(Protocol):
    """
    The task that runs here, as report_progress() and track() see it. To be inherited from.

    Most tasks report nothing, so the Reporter and the Cancellation are made at their first use.
    """

    __slots__ = ()

    id: str
    lock: threading.RLock  # guards the two objects below, and all of the reporter
    interval: float  # seconds between two samples, at least
    reporter: Reporter | None
    cancellation: Cancellation | None

    @property
    @abstractmethod
    def is_finished(self) -> bool:
        """Whether the task's end was recorded, after which no report has an effect."""

    @abstractmethod
    def report(self, number: int, progress: Progress) -> object:
        """Publish a sample of the progress. Called from any thread; see Reporter."""

    def get_reporter(self) -> Reporter:
        """Return the task's reporter. Called from any thread."""
        with self.lock:
            if self.reporter is None:
                reporter = Reporter(
                    self.report, self.interval, self.get_cancellation(), lock=self.lock
                )
                if self.is_finished:
                    reporter.close()
                # A finalizer may have reported during these lines; then its reporter counts.
                if self.reporter is None:
                    self.reporter = reporter  # type: ignore[misc] # a slot of the subclass
            return self.reporter

    def get_cancellation(self) -> Cancellation:
        """Return the task's cancellation. Called from any thread."""
        with self.lock:
            if self.cancellation is None:
                cancellation = Cancellation()
                # As in get_reporter().
                if self.cancellation is None:
                    self.cancellation = cancellation  # type: ignore[misc]
            return self.cancellation

    def close_progress(self) -> tuple[int, Progress | None]:
        """Stop publishing; return the last sample's number and the final state, if there is one."""
        return (0, None) if self.reporter is None else self.reporter.close()


current_reporting: ContextVar[Reporting | None] = ContextVar("current_reporting")


@reset_in_child
def _leave_task() -> None:
    # The task goes on in the parent, whose hub no report of the child reaches. Another thread of
    # the parent may have held the lock of the task at the fork.
    current_reporting.set(None)
