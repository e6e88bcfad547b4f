"""
What a task says of itself while it runs: current_result_id, report_progress() and track().

A task has one Reporter. It keeps what the task reported last and hands samples of it to a
`publish` function: at most one in each interval, and always the last one. This module knows
nothing of the hub or of a pipe; `publish` is where they come in.
"""

import heapq
import itertools
import json
import logging
import math
import numbers
import os
import threading
import time
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator
from contextvars import ContextVar
from enum import Enum
from typing import Any, Final, Literal, Protocol, overload

from django.utils.functional import Promise

from .events import Progress
from .exceptions import TaskCancelled

logger = logging.getLogger(__name__)

# Inside a task: the id of its result. Outside of one, get() raises LookupError.
current_result_id: ContextVar[str] = ContextVar("current_result_id")
current_reporter: ContextVar["Reporter"] = ContextVar("current_reporter")

PROGRESS_INTERVAL = 0.05  # seconds; for tasks whose backend has no such option
SMOOTHING = 5.0  # seconds over which the rate is averaged
LARGEST = 1e100  # of `current` and `total`: no percentage, rate or ETA of them overflows
_LARGEST_INT = 10**100


class _Unset(Enum):
    UNSET = "unset"


UNSET: Final = _Unset.UNSET
type Unset = Literal[_Unset.UNSET]
type Number = int | float


def report_progress(
    current: Number | Unset | None = UNSET,
    total: Number | Unset | None = UNSET,
    message: str | Unset | None = UNSET,
    **data: Any,
) -> None:
    """
    Say how far the running task is. Called from the task, in any of its threads.

    What is left out keeps its last value; None means unknown. `total` starts as 100, so `current`
    alone is a percentage. `data` must be JSON and replaces the last data. Outside of a task the
    arguments are checked and nothing else happens.

    Raises TypeError or ValueError, naming the argument, for a value that is not a finite number,
    a total that is not above zero, a message that is not text, and data that is not JSON.
    Raises TaskCancelled, once, after the task was cancelled.
    """
    if current is not UNSET:
        current = _number("current", current)
    if total is not UNSET:
        total = _positive(_number("total", total))
    if message is not UNSET:
        message = _text(message)
    reporter = current_reporter.get(None)
    checked = _json(data) if data else UNSET
    if reporter is not None:
        reporter.report(current, total, message, checked)


@overload
def track[T](
    iterable: Iterable[T], total: Number | Unset | None = ..., message: str | Unset | None = ...
) -> Iterator[T]: ...
@overload
def track[T](
    iterable: AsyncIterable[T],
    total: Number | Unset | None = ...,
    message: str | Unset | None = ...,
) -> AsyncIterator[T]: ...
def track[T](
    iterable: Iterable[T] | AsyncIterable[T],
    total: Number | Unset | None = UNSET,
    message: str | Unset | None = UNSET,
) -> Iterator[T] | AsyncIterator[T]:
    """
    Yield the items of `iterable` and report how many are done. Called from the task.

    `total` is len(iterable) where there is one; None, or nothing to count, means unknown.
    A `report_progress(message=...)` between two items keeps the count.

    Raises TypeError or ValueError as report_progress() does, and TaskCancelled after an item when
    the task was cancelled.
    """
    if total is UNSET:
        total = _length(iterable)
    total = _number("total", total)
    # An empty query has the total 0, which is not a mistake: there is nothing to count.
    total = None if total == 0 else _positive(total)
    if message is not UNSET:
        message = _text(message)
    reporter = current_reporter.get(None)
    if isinstance(iterable, AsyncIterable):
        return aiter(iterable) if reporter is None else _atrack(reporter, iterable, total, message)
    return iter(iterable) if reporter is None else _track(reporter, iterable, total, message)


# In both loops the task's thread only counts; the sampler's thread looks at the count. The store
# needs no lock: it is atomic, and the sampler reads each value as a whole.


def _track[T](
    reporter: "Reporter", iterable: Iterable[T], total: Number | None, message: str | Unset
) -> Iterator[T]:
    count = 0
    reporter.start_tracking(total, message)
    try:
        for item in iterable:
            yield item
            count += 1
            reporter.current = count
            if reporter.cancelled:
                reporter.raise_if_cancelled()
    finally:
        reporter.stop_tracking()


async def _atrack[T](
    reporter: "Reporter", iterable: AsyncIterable[T], total: Number | None, message: str | Unset
) -> AsyncIterator[T]:
    count = 0
    reporter.start_tracking(total, message)
    try:
        async for item in iterable:
            yield item
            count += 1
            reporter.current = count
            if reporter.cancelled:
                reporter.raise_if_cancelled()
    finally:
        reporter.stop_tracking()


class Reporter:
    """
    The progress of one task: what it reported last, and when a sample of it was published.

    `publish(number, progress)` gets samples numbered 1, 2, 3, ... and may get them from two
    threads at once; a lower number is then the older one. It must not block.
    """

    __slots__ = (
        "_base",
        "_clock",
        "_closed",
        "_lock",
        "_next_at",
        "_number",
        "_publish",
        "_published",
        "_queued",
        "_rate",
        "_rate_weight",
        "_sampler",
        "_tracking",
        "_was_told",
        "cancelled",
        "current",
        "data",
        "interval",
        "message",
        "total",
    )

    def __init__(
        self,
        publish: Callable[[int, Progress], object],
        interval: float = PROGRESS_INTERVAL,
        *,
        clock: Callable[[], float] = time.monotonic,
        sampler: "Sampler | None" = None,
    ) -> None:
        self.current: Number | None = None
        self.total: Number | None = 100
        self.message = ""
        self.data: dict[str, Any] = {}
        self.interval = interval
        self.cancelled = False  # and the task was not told yet
        self._was_told = False
        self._publish = publish
        self._clock = clock
        self._sampler = sampler or default_sampler
        # Guards everything here but `current` while it is tracked. Re-entrant, because a signal
        # handler or a finalizer may report in the midst of a report.
        self._lock = threading.RLock()
        self._closed = False
        self._queued = False  # the sampler will look at this reporter
        self._tracking = 0  # open track() loops
        self._number = 0
        self._next_at = -math.inf
        self._published: tuple[Any, ...] | None = None
        self._base: tuple[Number, float] | None = None
        self._rate = self._rate_weight = 0.0

    def report(
        self,
        current: Number | Unset | None = UNSET,
        total: Number | Unset | None = UNSET,
        message: str | Unset = UNSET,
        data: dict[str, Any] | Unset = UNSET,
    ) -> None:
        """Note checked values, and publish a sample now or let the sampler do it when it is due."""
        with self._lock:
            if self.cancelled:
                self.raise_if_cancelled()
            if self._closed:
                logger.debug(
                    "Task id=%s reported progress after it was finished; it is ignored.",
                    current_result_id.get(None),
                )
                return
            if current is not UNSET:
                self.current = current
            if total is not UNSET:
                self.total = total
            if message is not UNSET:
                self.message = message
            if data is not UNSET:
                self.data = data
            if self._queued:
                return
            now = self._clock()
            if now < self._next_at:
                self._queued = True
                self._sampler.add(self, self._next_at)
                return
            number, progress = self._sample_locked(now)
        self._publish(number, progress)

    def sample(self) -> float | None:
        """
        Publish what has changed since the last sample; return when to look again, or None.

        Called in the sampler's thread.
        """
        with self._lock:
            if self._closed:
                return None
            self._queued = bool(self._tracking)
            now = self._clock()
            again = now + max(self.interval, 0.005) if self._queued else None
            if self._values() == self._published:
                return again
            number, progress = self._sample_locked(now)
        try:
            self._publish(number, progress)
        except Exception:
            # A `publish` that raises must not silence the other tasks.
            logger.exception("A sample of a task's progress could not be published.")
        return again

    def close(self) -> tuple[int, Progress | None]:
        """Publish nothing any more; return the last number and the final state, if any."""
        with self._lock:
            self._closed = True
            if self._published is None:
                return self._number, None
            return self._number, self._progress(self._clock())

    def start_tracking(self, total: Number | None, message: str | Unset) -> None:
        """Begin a track() loop: from now on the sampler looks at `current` by itself."""
        self.report(0, total, message)
        with self._lock:
            self._tracking += 1
            if not self._queued and not self._closed:
                self._queued = True
                self._sampler.add(self, self._next_at)

    def stop_tracking(self) -> None:
        """End a track() loop; the sampler looks once more, for the last value."""
        with self._lock:
            self._tracking -= 1

    def cancel(self) -> None:
        """
        Make the next step of the task raise TaskCancelled, once. Called from any thread.

        Whoever cancels again must not interrupt what the task does in its `finally`.
        """
        with self._lock:
            self.cancelled = not self._was_told

    def take_cancellation(self) -> bool:
        """Whether the task was cancelled and was not told yet; it is told once."""
        with self._lock:
            cancelled, self.cancelled = self.cancelled, False
            self._was_told |= cancelled
        return cancelled

    def raise_if_cancelled(self) -> None:
        """Raise TaskCancelled if the task was cancelled and was not told yet."""
        if self.take_cancellation():
            raise TaskCancelled("The task was cancelled.")

    def _values(self) -> tuple[Any, ...]:
        return self.current, self.total, self.message, self.data

    def _sample_locked(self, now: float) -> tuple[int, Progress]:
        self._next_at = now + self.interval
        self._published = self._values()
        self._number += 1
        return self._number, self._progress(now)

    def _progress(self, now: float) -> Progress:
        current, total, message, data = self._values()
        rate = self._smoothed_rate(current, now)
        return Progress(
            current=current,
            total=total,
            percent=_percent(current, total),
            message=message,
            data=data,
            rate=rate,
            eta=_eta(current, total, rate),
        )

    def _smoothed_rate(self, current: Number | None, now: float) -> float | None:
        """
        Average the steps a second, later ones weighing more, over about SMOOTHING seconds.

        The first report is the base, not 0: a task that goes on at 5,000 has not done 5,000 steps.
        """
        if current is None or self._base is None or current < self._base[0]:
            self._base = None if current is None else (current, now)
            self._rate = self._rate_weight = 0.0
            return None
        base, base_at = self._base
        if current > base and now > base_at:
            weight = 1 - math.exp((base_at - now) / SMOOTHING)
            step_rate = float(current - base) / (now - base_at)
            self._rate += weight * (step_rate - self._rate)
            self._rate_weight += weight * (1 - self._rate_weight)
            self._base = (current, now)
        if not self._rate_weight:
            return None
        return float(f"{self._rate / self._rate_weight:.4g}")


class Sampled(Protocol):
    """What a Sampler looks at; a Reporter is one."""

    def sample(self) -> float | None:
        """Publish what is due; return when to look again, of time.monotonic(), or None."""


class Sampler:
    """
    One thread that publishes, when it is due, what reporters had to hold back.

    The thread starts with the first reporter and is named `django-tasks-progress`. It looks after
    the positions of waiting tasks too.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Start anew, without a thread: in a child of fork() the parent's does not run."""
        # Guards the heap. Taken inside a reporter's lock, so nothing of a reporter runs inside.
        self._changed = threading.Condition(threading.Lock())
        self._due: list[tuple[float, int, Sampled]] = []
        self._order = itertools.count()
        self._thread: threading.Thread | None = None

    def add(self, sampled: Sampled, due_at: float) -> None:
        """Look at this one at that time of time.monotonic()."""
        with self._changed:
            entry = (due_at, next(self._order), sampled)
            heapq.heappush(self._due, entry)
            if self._thread is None:
                self._start_locked()
            elif self._due[0] is entry:
                self._changed.notify()

    def _start_locked(self) -> None:
        thread = threading.Thread(target=self._run, name="django-tasks-progress", daemon=True)
        try:
            thread.start()
        except RuntimeError:
            # The system has no more threads for us. The next reporter tries again.
            logger.exception("The thread that samples the progress of tasks did not start.")
        else:
            self._thread = thread

    def _run(self) -> None:
        while True:
            sampled = self._next()
            try:
                again_at = sampled.sample()
            except Exception:
                # A mistake of ours; the tasks of all others are sampled on.
                logger.exception("%s could not be sampled.", type(sampled).__name__)
                again_at = None
            if again_at is not None:
                self.add(sampled, again_at)
            del sampled  # It would live on while this thread waits.

    def _next(self) -> Sampled:
        with self._changed:
            while True:
                if not self._due:
                    self._changed.wait()
                    continue
                left = self._due[0][0] - time.monotonic()
                if left <= 0:
                    return heapq.heappop(self._due)[2]
                self._changed.wait(left)


default_sampler = Sampler()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=default_sampler.reset)


def _number(name: str, value: Any) -> Number | None:
    kind = type(value)
    # The usual case first, and int compared with int: this is part of every report.
    if kind is int and 0 <= value < _LARGEST_INT:
        return value  # type: ignore[no-any-return]
    if value is None:
        return None
    if kind is not int and kind is not float:
        if isinstance(value, bool) or not isinstance(value, numbers.Number):
            raise TypeError(f"{name} must be a number or None, not {value!r:.100}.")
        try:
            value = int(value) if isinstance(value, numbers.Integral) else float(value)  # type: ignore[arg-type]
        except OverflowError:
            value = math.inf
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name} must be a real number, not {value!r:.100}.") from error
    # False for NaN as well.
    if not -LARGEST < value < LARGEST:
        shown = value if isinstance(value, float) else "a number of that size"
        raise ValueError(f"{name} must be a finite number, not {shown}.")
    return value  # type: ignore[no-any-return]


def _positive(total: Number | None) -> Number | None:
    if total is not None and total <= 0:
        raise ValueError(f"total must be above zero, or None for unknown, not {total!r}.")
    return total


def _text(message: Any) -> str:
    if message is None:
        return ""
    if isinstance(message, str):
        return message
    if isinstance(message, Promise):  # a lazy translation, in the task's language
        return str(message)
    raise TypeError(f"message must be a string or None, not {message!r:.100}.")


def _json(data: dict[str, Any]) -> dict[str, Any]:
    """Return a copy that later changes of the task's objects do not reach."""
    try:
        copy: dict[str, Any] = json.loads(json.dumps(data, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"The data ({', '.join(data)}) must be JSON: {error}") from error
    return copy


def _length(iterable: Any) -> int | None:
    try:
        return len(iterable)
    except TypeError:
        return None


def _percent(current: Number | None, total: Number | None) -> float | None:
    if current is None or total is None:
        return None
    return min(max(100.0 * current / total, 0.0), 100.0)


def _eta(current: Number | None, total: Number | None, rate: float | None) -> float | None:
    if current is None or total is None or not rate:
        return None
    eta = max(total - current, 0) / rate
    return round(eta, 1) if math.isfinite(eta) else None
