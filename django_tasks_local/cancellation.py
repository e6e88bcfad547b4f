"""Cancellation delivers the cancellation of a running task to each part of the task's code."""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import suppress
from contextvars import ContextVar
from typing import Any

from .exceptions import TaskCancelled


class Cancellation:
    """
    Delivers the cancellation of one task, only once to each thread and asyncio task of the task.

    In synchronous code report_progress() and track() raise TaskCancelled. The task's coroutine is
    cancelled in its event loop. In a worker process a signal handler raises TaskCancelled.

    A context variable records the delivery. So `finally` blocks can complete, and so can the
    threads and asyncio tasks that start after the delivery, because they inherit the variable.
    """

    __slots__ = (
        "_has_coroutine",
        "_interrupted",
        "_lock",
        "_watched",
        "delivered",
        "has_cancelled_coroutine",
        "requested",
    )

    def __init__(self) -> None:
        # Guards changes of `requested`, `_has_coroutine` and `_watched` that other threads may
        # make. It is reentrant, because a signal handler or a finalizer may call any method while
        # the same thread is inside one.
        self._lock = threading.RLock()
        # True after request(). track() reads this attribute without the lock for each item.
        self.requested = False
        self.delivered = False  # True after the first delivery to any code of the task.
        self.has_cancelled_coroutine = False  # True after asyncio.Task.cancel() was called.
        self._has_coroutine = False  # True from expect_coroutine() or watch() on.
        self._interrupted = False  # True after the first interrupt().
        self._watched: tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]] | None = None

    def request(self) -> None:
        """
        Request the cancellation. May be called from any thread.

        The next report_progress() or step of track() raises TaskCancelled in each thread and
        asyncio task of the task, and the task's coroutine is cancelled.
        """
        with self._lock:
            self.requested = True
            watched = self._watched
        if watched is not None:
            self._cancel_soon(*watched)

    def raise_if_requested(self) -> None:
        """Raise TaskCancelled after request(), once in the calling thread or asyncio task."""
        if not self.requested or _delivered.get() is self or _is_asyncio_task_cancelled():
            return
        _delivered.set(self)
        self.delivered = True
        # Code in a context of its own, such as a coroutine in asyncio.run(), has raised the
        # TaskCancelled that the calling code handles.
        if isinstance(sys.exception(), TaskCancelled):
            return
        # Cancel the coroutine before the exception below can reach it. Otherwise the coroutine
        # would be cancelled while it cleans up because of this exception.
        if self._watched is not None:
            loop, task = self._watched
            if asyncio._get_running_loop() is loop:  # noqa: SLF001 - documented for libraries
                self._cancel_in_loop(loop, task)
            else:
                self._cancel_soon(loop, task)
        raise TaskCancelled("The task was cancelled.")

    def interrupt(self) -> None:
        """
        Cancel the task; called by a signal handler that interrupts the task's own thread.

        Raises TaskCancelled, unless the task is a coroutine, which its event loop cancels.
        """
        self.request()
        # A second signal may arrive during the task's clean-up, outside of the context in which
        # the first one has raised.
        if not self._has_coroutine and not self._interrupted:
            self._interrupted = True
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
            loop.call_soon_threadsafe(self._cancel_in_loop, loop, task)

    def _cancel_in_loop(self, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]) -> None:
        context = task.get_context()
        if self._watched is None or context.get(_delivered) is self:
            return
        try:
            context.run(_delivered.set, self)
        except RuntimeError:
            # The coroutine runs at present: it has started an eager asyncio task, which reported.
            self._cancel_soon(loop, task)
            return
        self.delivered = self.has_cancelled_coroutine = True
        task.cancel()


# The cancellation that was delivered to the code that runs in the current context.
_delivered: ContextVar[Cancellation | None] = ContextVar("_delivered", default=None)


def _is_asyncio_task_cancelled() -> bool:
    """Return whether the current asyncio task was cancelled, e.g. because its TaskGroup ends."""
    try:
        task = asyncio.current_task()
    except RuntimeError:  # No event loop runs in this thread.
        return False
    return task is not None and task.cancelling() > 0
