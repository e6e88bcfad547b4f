"""Cancellation delivers the cancellation of a running task to the task's code, once."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .exceptions import TaskCancelled

if TYPE_CHECKING:
    import asyncio


class Cancellation:
    """
    Delivers the cancellation of one task, only once, so that `finally` blocks can complete.

    In synchronous code report_progress() and track() raise TaskCancelled. A coroutine is cancelled
    in its event loop. In a worker process a signal handler raises TaskCancelled.
    """

    __slots__ = (
        "_has_coroutine",
        "_lock",
        "_watched",
        "delivered",
        "has_cancelled_coroutine",
        "requested",
    )

    def __init__(self) -> None:
        # Guards changes of `requested`, `delivered`, `_has_coroutine` and `_watched` that other
        # threads may make. It is reentrant, because a signal handler or a finalizer may call any
        # method while the same thread is inside one.
        self._lock = threading.RLock()
        # True from request() until the cancellation is delivered. track() reads this attribute
        # without the lock for each item.
        self.requested = False
        self.delivered = False
        self.has_cancelled_coroutine = False  # True after asyncio.Task.cancel() was called.
        self._has_coroutine = False  # True from expect_coroutine() or watch() on.
        self._watched: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def request(self) -> None:
        """
        Request the cancellation; do nothing if it was delivered. May be called from any thread.

        The next report_progress() or step of track() raises TaskCancelled, or the task's coroutine
        is cancelled.
        """
        with self._lock:
            if self.delivered:
                return
            self.requested = True
            watched = self._watched
        if watched is not None:
            self._cancel_soon(*watched)

    def consume(self) -> bool:
        """Return True once after request(); the caller must then deliver the cancellation."""
        with self._lock:
            if self.delivered or not self.requested:
                return False
            # No signal handler or finalizer can run between this check and these assignments, so
            # no second caller gets True.
            self.delivered = True
            self.requested = False
            return True

    def raise_if_requested(self) -> None:
        """Raise TaskCancelled if request() was called and the cancellation was not delivered."""
        if self.consume():
            raise TaskCancelled("The task was cancelled.")

    def interrupt(self) -> None:
        """
        Cancel the task; called by a signal handler that interrupts the task's own thread.

        Raises TaskCancelled, unless the task is a coroutine, which its event loop cancels.
        """
        self.request()
        if not self._has_coroutine:
            self.raise_if_requested()

    def expect_coroutine(self) -> None:
        """Let interrupt() raise nothing, because watch() will be called for a coroutine."""
        self._has_coroutine = True

    def watch(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        """Let this coroutine receive the cancellation. Called in the coroutine's event loop."""
        with self._lock:
            self._has_coroutine = True
            self._watched = loop, task
            requested = self.requested
        if requested:
            self._cancel_soon(loop, task)

    def unwatch(self) -> None:
        """
        Stop delivery, because the coroutine has ended and only code of this package follows.

        Called in the coroutine's event loop.
        """
        with self._lock:
            self._watched = None

    def _cancel_soon(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        with suppress(RuntimeError):  # The loop is closed, so the coroutine has ended already.
            loop.call_soon_threadsafe(self._cancel_coroutine, task)

    def _cancel_coroutine(self, task: asyncio.Task[Any]) -> None:
        if self._watched is not None and self.consume():
            self.has_cancelled_coroutine = True
            task.cancel()
