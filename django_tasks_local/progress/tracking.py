"""Count the steps of a loop with track(); the ticker's thread reads and publishes the count."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, Protocol, overload

from django.core.exceptions import SynchronousOnlyOperation

from ..aliases import Number
from .reporter import LoopProgress, Reporter, current_reporting
from .values import UNSET, Unset, check_message, check_number, check_total


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
) -> _SyncAndAsyncIterator[T]: ...
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
    Yield the items of `iterable` and report how many of them the loop has finished.

    The task calls track() in any thread that has its context, as report_progress(). For a
    QuerySet, write `for` or `async for`, as without track(). If `total` is omitted, track() reads
    len(iterable) when the loop begins, or at the first item of an `async for`. None, an iterable
    without length and an empty one mean an unknown total. A `report_progress(message=...)` between
    two items keeps the count. After a loop inside another one has ended, the page shows the outer
    loop's count, total and message again.

    Raises TypeError or ValueError for a wrong `total` or `message`, as report_progress() does, and
    TaskCancelled after the current item when the task was cancelled.
    """
    if total is not UNSET:
        # Accept the total 0 as unknown: it is the count() of an empty query, and no mistake.
        total = check_total(check_number("total", total) or None)
    if message is not UNSET:
        message = check_message(message)
    run = current_reporting.get(None)
    reporter = None if run is None else run.get_reporter()
    items: Iterator[T] = _track(reporter, iterable, total, message)
    aitems: AsyncIterator[T] = _atrack(reporter, iterable, total, message)
    if not isinstance(iterable, AsyncIterable):
        return items
    if not isinstance(iterable, Iterable):
        return aitems
    return _SyncAndAsyncIterator(items, aitems)


# In _track() and _atrack() the task's thread only counts, and the ticker's thread reads the count.
# Both functions store `current` and `total` without a lock, because each store is atomic, and a
# sample may combine an older value of one with a newer value of the other.


def _track(
    reporter: Reporter | None, iterable: Any, total: Number | Unset | None, message: str | Unset
) -> Iterator[Any]:
    items = iter(iterable)  # iter() fetches a QuerySet, so len() needs no query.
    if reporter is None:
        yield from items
        return
    count = 0
    loop = LoopProgress(0, _length(iterable) if total is UNSET else total)
    cancellation = reporter.cancellation
    try:
        reporter.start_tracking(loop, message)
        for item in items:
            yield item
            count += 1
            loop.current = count
            if cancellation.requested:
                cancellation.raise_if_requested()
    finally:
        reporter.stop_tracking(loop)


async def _atrack(
    reporter: Reporter | None, iterable: Any, total: Number | Unset | None, message: str | Unset
) -> AsyncIterator[Any]:
    items = aiter(iterable)
    if reporter is None:
        async for item in items:
            yield item
        return
    count = 0
    loop = LoopProgress(0, None if total is UNSET else total)
    cancellation = reporter.cancellation
    try:
        reporter.start_tracking(loop, message)
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
    finally:
        reporter.stop_tracking(loop)


def _length(iterable: Any) -> int | None:
    try:
        return len(iterable) or None
    except (TypeError, OverflowError, SynchronousOnlyOperation):
        # The total is unknown: the iterable has no length, or one above sys.maxsize, or len()
        # would send a query in the event loop's thread, which Django forbids.
        return None
