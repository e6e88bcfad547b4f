"""track(): a loop that counts, and the ticker's thread that reads the count."""

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator
from typing import Any, Protocol, overload

from django.core.exceptions import SynchronousOnlyOperation

from ..aliases import Number
from .reporter import LoopProgress, Reporter, current_reporting
from .values import UNSET, Unset, check_message, check_number, check_total


class _SyncAndAsyncIterable[T](Iterable[T], AsyncIterable[T], Protocol):
    """An iterable for `for` and `async for`, such as a QuerySet."""


class _SyncAndAsyncIterator[T](Iterator[T], AsyncIterator[T]):
    """Iterator for such an iterable; the caller's `for` or `async for` decides which it is."""

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
    Yield the items of `iterable` and report how many are done. Called as report_progress() is.

    For a QuerySet, write `for` or `async for`, as without track(). `total` is len(iterable) if
    the iterable has a length, read when the loop begins; in an `async for`, with the first item.
    None, or an empty iterable, means unknown. A `report_progress(message=...)` between two items
    keeps the count. When a loop inside another one ends, the outer loop's count, total and message
    are shown again.

    Raises TypeError or ValueError as report_progress() does, and TaskCancelled after an item when
    the task was cancelled.
    """
    if total is not UNSET:
        # An empty query has the total 0: not a mistake, there is nothing to count.
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


# In both loops the task's thread only counts, and the ticker's thread reads the count. The stores
# need no lock: each is atomic, and the reader needs no two of them from the same moment.


def _track(
    reporter: Reporter | None, iterable: Any, total: Number | Unset | None, message: str | Unset
) -> Iterator[Any]:
    items = iter(iterable)  # This fetches a queryset, so its length needs no second query.
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
            # Not before the first item: then a queryset was fetched, and len() needs no query.
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
        # No length, one above sys.maxsize, or one that needs a query in the event loop's thread.
        return None
