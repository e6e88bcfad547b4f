"""Count the steps of a loop with track(); the ticker's thread reads and publishes the count."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, Protocol, overload

from django.core.exceptions import SynchronousOnlyOperation

from ..aliases import Number
from .loops import LoopProgress
from .reporter import Reporter, current_reporting
from .values import UNSET, Unset, check_text, check_total


class _SyncAndAsyncIterable[T](Iterable[T], AsyncIterable[T], Protocol):
    """Describes an iterable for both `for` and `async for`, such as a QuerySet."""


class _SyncAndAsyncIterator[T](Iterator[T], AsyncIterator[T]):
    """Iterates over a QuerySet in a `for` or in an `async for`, whichever the caller writes."""

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
    iterable: _SyncAndAsyncIterable[T],
    total: Number | Unset | None = ...,
    message: str | Unset | None = ...,
    unit: str | Unset | None = ...,
) -> _SyncAndAsyncIterator[T]: ...
@overload
def track[T](
    iterable: Iterable[T],
    total: Number | Unset | None = ...,
    message: str | Unset | None = ...,
    unit: str | Unset | None = ...,
) -> Iterator[T]: ...
@overload
def track[T](
    iterable: AsyncIterable[T],
    total: Number | Unset | None = ...,
    message: str | Unset | None = ...,
    unit: str | Unset | None = ...,
) -> AsyncIterator[T]: ...
def track[T](
    iterable: Iterable[T] | AsyncIterable[T],
    total: Number | Unset | None = UNSET,
    message: str | Unset | None = UNSET,
    unit: str | Unset | None = UNSET,
) -> Iterator[T] | AsyncIterator[T]:
    """
    Yield the items of `iterable` and report how many of them the loop has finished.

    The task calls track() in any thread that has its context, as report_progress(). For a
    QuerySet, write `for` or `async for`, as without track(). If `total` is omitted, track() reads
    len(iterable) when the loop begins, or at the first item of an `async for`. None and an iterable
    without length mean an unknown total; 0 means that there is nothing to do, which is 100 %.
    `unit` names the items.

    If loops are nested, the bar shows the count, total and unit of the outermost one, and the
    newest message. Each step of an inner loop moves the percentage of the outer one by a part of a
    step. report_progress() between two items stores its values in the innermost loop.

    Raises TypeError or ValueError for a wrong argument, as report_progress() does, and
    TaskCancelled after the current item when the task was cancelled.
    """
    if total is not UNSET:
        total = check_total(total)
    message = None if message is UNSET else check_text("message", message)
    unit = "" if unit is UNSET else check_text("unit", unit)
    run = current_reporting.get(None)
    reporter = None if run is None else run.get_reporter()
    items: Iterator[T] = _track(reporter, iterable, total, message, unit)
    aitems: AsyncIterator[T] = _atrack(reporter, iterable, total, message, unit)
    if not isinstance(iterable, AsyncIterable):
        return items
    if not isinstance(iterable, Iterable):
        return aitems
    return _SyncAndAsyncIterator(items, aitems)


# In _track() and _atrack() the task's thread only counts, and the ticker's thread reads the count.
# Both functions store `current` and `total` without a lock, because each store is atomic, and a
# sample may combine an older value of one with a newer value of the other.


def _track(
    reporter: Reporter | None,
    iterable: Any,
    total: Number | Unset | None,
    message: str | None,
    unit: str,
) -> Iterator[Any]:
    items = iter(iterable)  # iter() fetches a QuerySet, so len() needs no query.
    if reporter is None:
        yield from items
        return
    count = 0
    loop = LoopProgress(0, _length(iterable) if total is UNSET else total, message, unit)
    cancellation = reporter.cancellation
    try:
        reporter.start_tracking(loop)
        for item in items:
            yield item
            count += 1
            loop.current = count
            if cancellation.requested:
                cancellation.raise_if_requested()
    finally:
        reporter.stop_tracking(loop)


async def _atrack(
    reporter: Reporter | None,
    iterable: Any,
    total: Number | Unset | None,
    message: str | None,
    unit: str,
) -> AsyncIterator[Any]:
    items = aiter(iterable)
    if reporter is None:
        async for item in items:
            yield item
        return
    count = 0
    loop = LoopProgress(0, None if total is UNSET else total, message, unit)
    cancellation = reporter.cancellation
    try:
        reporter.start_tracking(loop)
        async for item in items:
            # Read the length after the first item: a QuerySet is fetched then, so that len()
            # needs no query.
            if not count and total is UNSET:
                loop.total = _length(iterable)
            yield item
            count += 1
            loop.current = count
            if cancellation.requested:
                cancellation.raise_if_requested()
        if not count and total is UNSET:
            loop.total = _length(iterable)
    finally:
        reporter.stop_tracking(loop)


def _length(iterable: Any) -> int | None:
    try:
        return len(iterable)
    except (TypeError, OverflowError, SynchronousOnlyOperation):
        # The total is unknown: the iterable has no length, or one above sys.maxsize, or len()
        # would send a query in the event loop's thread, which Django forbids.
        return None
