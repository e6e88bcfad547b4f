"""Whether a running task was cancelled, and how that reaches its code. Imports exceptions only."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from .exceptions import TaskCancelled

if TYPE_CHECKING:
    import asyncio


class Cancellation:
    """
    The cancellation of one task. It is delivered once, so it cannot interrupt `finally` blocks.

    In synchronous code report_progress() and track() deliver it: they raise TaskCancelled. A
    coroutine is cancelled in its event loop. In a worker process a signal handler raises it.
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
        # Guards the attributes below. Reentrant, because a signal handler or a finalizer may
        # call any method while the same thread is inside one.
        self._lock = threading.RLock()
        # Cancelled, and not delivered yet. track() reads it without the lock for each item.
        self.requested = False
        self.delivered = False
        self.has_cancelled_coroutine = False  # It was delivered by asyncio.Task.cancel().
        self._has_coroutine = False  # The task is a coroutine that has begun.
        self._watched: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def request(self) -> None:
        """
        Have the cancellation delivered, unless it already was. Called from any thread.

        The next step of report_progress() or track() raises it, or the coroutine is cancelled.
        """
        with self._lock:
            if self.delivered:
                return
            self.requested = True
            watched = self._watched
        if watched is not None:
            self._cancel_soon(*watched)

    def consume(self) -> bool:
        """Return True once after request(): then the caller must deliver the cancellation."""
        with self._lock:
            if self.delivered or not self.requested:
                return False
            # Nothing between these lines can call a method of this object.
            self.delivered = True
            self.requested = False
            return True

    def raise_if_requested(self) -> None:
        """Raise TaskCancelled if the task was cancelled and this was not delivered yet."""
        if self.consume():
            raise TaskCancelled("The task was cancelled.")

    def interrupt(self) -> None:
        """
        Cancel from a signal handler that runs in the task's thread, between two instructions.

        Raises TaskCancelled, unless the task is a coroutine, which its event loop cancels.
        """
        self.request()
        if not self._has_coroutine:
            self.raise_if_requested()

    def watch(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        """Deliver the cancellation to this coroutine. Called in its event loop."""
        with self._lock:
            self._has_coroutine = True
            self._watched = loop, task
            requested = self.requested
        if requested:
            self._cancel_soon(loop, task)

    def unwatch(self) -> None:
        """
        Stop delivering: the coroutine has returned, and the code that follows is not the task's.

        Called in its event loop.
        """
        with self._lock:
            self._watched = None

    def _cancel_soon(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        with suppress(RuntimeError):  # The loop is closed, so the coroutine has just ended.
            loop.call_soon_threadsafe(self._cancel_coroutine, task)

    def _cancel_coroutine(self, task: asyncio.Task[Any]) -> None:
        if self._watched is not None and self.consume():
            self.has_cancelled_coroutine = True
            task.cancel()
