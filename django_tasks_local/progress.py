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

from django.core.exceptions import SynchronousOnlyOperation
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
    Say how far the running task is. Called from the task, in any thread that has its context.

    asyncio.to_thread() and sync_to_async() hand the context on; threading.Thread and
    ThreadPoolExecutor do not, and there it is as outside of a task. Hand it on yourself:
    `executor.submit(copy_context().run, function, argument)`, with contextvars.copy_context().

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


class _Both[T](Iterable[T], AsyncIterable[T], Protocol):
    """What either loop takes, as a QuerySet is."""


class _BothLoops[T](Iterator[T], AsyncIterator[T]):
    """What track() makes of _Both: only the loop that begins shows which of the two it is."""

    def __init__(self, items: Iterator[T], aitems: AsyncIterator[T]) -> None:
        self._items = items
        self._aitems = aitems

    def __iter__(self) -> Iterator[T]:
        return self._items

    def __next__(self) -> T:
        return next(self._items)

    def __aiter__(self) -> AsyncIterator[T]:
        return self._aitems

    async def __anext__(self) -> T:
        return await anext(self._aitems)


@overload
def track[T](
    iterable: _Both[T], total: Number | Unset | None = ..., message: str | Unset | None = ...
) -> _BothLoops[T]: ...
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
    Yield the items of `iterable` and report how many are done. Called as report_progress() is.

    For a QuerySet, write `for` or `async for`, as without track(). `total` is len(iterable) where
    there is one, looked up when the loop begins; in an `async for`, with the first item. None, or
    nothing to count, means unknown. A `report_progress(message=...)` between two items keeps the
    count. When a loop inside another one ends, the outer one's count, total and message are back.

    Raises TypeError or ValueError as report_progress() does, and TaskCancelled after an item when
    the task was cancelled.
    """
    if total is not UNSET:
        total = _number("total", total)
        # An empty query has the total 0, which is not a mistake: there is nothing to count.
        total = None if total == 0 else _positive(total)
    if message is not UNSET:
        message = _text(message)
    reporter = current_reporter.get(None)
    items: Iterator[T] = _track(reporter, iterable, total, message)
    aitems: AsyncIterator[T] = _atrack(reporter, iterable, total, message)
    if not isinstance(iterable, AsyncIterable):
        return items
    if not isinstance(iterable, Iterable):
        return aitems
    return _BothLoops(items, aitems)


# In both loops the task's thread only counts; the sampler's thread looks at the count. The stores
# need no lock: they are atomic, and the sampler reads each value as a whole.


def _track(
    reporter: "Reporter | None", iterable: Any, total: Number | Unset | None, message: str | Unset
) -> Iterator[Any]:
    items = iter(iterable)  # This fetches a queryset. So its length costs no second query.
    if reporter is None:
        yield from items
        return
    count = 0
    loop = Count(0, _length(iterable) if total is UNSET else total)
    try:
        reporter.start_tracking(loop, message)
        for item in items:
            yield item
            count += 1
            loop.current = count
            if reporter.cancelled:
                reporter.raise_if_cancelled()
    finally:
        reporter.stop_tracking(loop)


async def _atrack(
    reporter: "Reporter | None", iterable: Any, total: Number | Unset | None, message: str | Unset
) -> AsyncIterator[Any]:
    items = aiter(iterable)
    if reporter is None:
        async for item in items:
            yield item
        return
    count = 0
    loop = Count(0, None if total is UNSET else total)
    try:
        reporter.start_tracking(loop, message)
        async for item in items:
            # Not earlier: a queryset has been fetched now, and its length needs no query.
            if not count and total is UNSET:
                loop.total = _length(iterable)
            yield item
            count += 1
            loop.current = count
            if reporter.cancelled:
                reporter.raise_if_cancelled()
    finally:
        reporter.stop_tracking(loop)


class Count:
    """
    How far one thing is, and how fast it goes: a task, or a track() loop in it.

    A reporter's lock guards it, except for what a track() loop stores.
    """

    __slots__ = ("_base", "_rate", "_rate_weight", "current", "first_message", "message", "total")

    def __init__(self, current: Number | None, total: Number | None) -> None:
        self.current = current
        self.total = total
        self.message = self.first_message = ""
        self._base: tuple[Number, float] | None = None
        self._rate = self._rate_weight = 0.0

    def start(self, message: str, now: float) -> None:
        """Begin a loop, with the message that it is given or finds."""
        self.message = self.first_message = message
        self._base = (0, now)

    def rate(self, now: float) -> float | None:
        """
        Average the steps a second, later ones weighing more, over about SMOOTHING seconds.

        The first report is the base, not 0: a task that goes on at 5,000 has not done 5,000 steps.
        """
        current = self.current
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


class Reporter:
    """
    The progress of one task: what it reported last, and when a sample of it was published.

    `publish(number, progress)` gets samples numbered 1, 2, 3, ... and may get them from two
    threads at once; a lower number is then the older one. It must not block.
    """

    __slots__ = (
        "_clock",
        "_closed",
        "_lock",
        "_loops",
        "_next_at",
        "_number",
        "_outermost",
        "_publish",
        "_published",
        "_queued",
        "_sampler",
        "_shown",
        "_was_told",
        "cancelled",
        "data",
        "interval",
    )

    def __init__(
        self,
        publish: Callable[[int, Progress], object],
        interval: float = PROGRESS_INTERVAL,
        *,
        clock: Callable[[], float] = time.monotonic,
        sampler: "Sampler | None" = None,
    ) -> None:
        self.data: dict[str, Any] = {}
        self.interval = interval
        self.cancelled = False  # and the task was not told yet
        self._was_told = False
        self._publish = publish
        self._clock = clock
        self._sampler = sampler or default_sampler
        # Guards everything here but what track() loops store. Re-entrant, because a signal
        # handler or a finalizer may report in the midst of a report.
        self._lock = threading.RLock()
        self._closed = False
        self._queued = False  # the sampler will look at this reporter
        self._loops: list[Count] = []  # the open track() loops, the newest one last
        self._shown = self._outermost = Count(None, 100)  # where reports go, and the first loop
        self._number = 0
        self._next_at = -math.inf
        self._published: tuple[Any, ...] | None = None

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
            shown = self._shown
            if current is not UNSET:
                shown.current = current
            if total is not UNSET:
                shown.total = total
            if message is not UNSET:
                shown.message = message
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
            self._queued = bool(self._loops)
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
            if self._loops:  # asyncio may have had no time to close one that was left early
                self._show_locked(self._outermost)
            if self._published is None:
                return self._number, None
            return self._number, self._progress(self._clock())

    def start_tracking(self, loop: Count, message: str | Unset) -> None:
        """Begin a track() loop: from now on the sampler looks at its count by itself."""
        with self._lock:
            if self.cancelled:
                self.raise_if_cancelled()
            if not self._closed:
                loop.start(self._shown.message if message is UNSET else message, self._clock())
                if not self._loops:
                    self._outermost = loop
                self._loops.append(loop)
                self._shown = loop
        self.report()
        with self._lock:
            if not self._queued and not self._closed:
                self._queued = True
                self._sampler.add(self, self._next_at)

    def stop_tracking(self, loop: Count) -> None:
        """
        End a track() loop, if it has begun; the sampler looks once more, for the last value.

        The loop around it is shown again, with its own message, unless the task has reported
        another one meanwhile. Loops may end in any order: coroutines have theirs side by side.
        """
        with self._lock:
            if loop not in self._loops:
                return
            self._loops.remove(loop)
            if self._shown is loop:
                self._show_locked(self._loops[-1] if self._loops else self._outermost)

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

    def _show_locked(self, outer: Count) -> None:
        if self._shown.message is not self._shown.first_message:
            outer.message = self._shown.message
        self._shown = outer

    def _values(self) -> tuple[Any, ...]:
        shown = self._shown
        return shown.current, shown.total, shown.message, self.data

    def _sample_locked(self, now: float) -> tuple[int, Progress]:
        self._next_at = now + self.interval
        self._published = self._values()
        self._number += 1
        return self._number, self._progress(now)

    def _progress(self, now: float) -> Progress:
        current, total, message, data = self._values()
        rate = self._shown.rate(now)
        return Progress(
            current=current,
            total=total,
            percent=_percent(current, total),
            message=message,
            data=data,
            rate=rate,
            eta=_eta(current, total, rate),
        )


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
        return len(iterable) or None
    except (TypeError, OverflowError, SynchronousOnlyOperation):
        # There is none, it is beyond all counting, or it takes a query in the loop's thread.
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
