"""Run the coroutine of a task in the calling thread, in a new event loop."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from django.core.cache import close_caches

from ..exceptions import TaskCancelled
from . import connections
from .daemon_threads import new_event_loop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from ..cancellation import Cancellation


def run_coroutine(
    function: Callable[[], Coroutine[Any, Any, Any]], cancellation: Cancellation
) -> Any:
    """
    Run a task's coroutine function and return its value. `cancellation` cancels the coroutine.

    async_to_sync() cannot replace this function: it starts a thread that the interpreter joins at
    exit, however long the task takes. The calling thread and the threads for the coroutine's sync
    code are daemon threads, which the interpreter does not join.
    """
    # After this call a signal handler raises nothing in this thread, so neither of the coroutines
    # that are created below can be left without having been awaited.
    cancellation.expect_coroutine()
    context = copy_context()
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(_watch(function, cancellation), context=context)
    finally:
        context.run(connections.try_to, close_caches)


async def _watch(
    function: Callable[[], Coroutine[Any, Any, Any]], cancellation: Cancellation
) -> Any:
    asyncio_task = asyncio.current_task()
    assert asyncio_task is not None
    cancellation.watch(asyncio.get_running_loop(), asyncio_task)
    try:
        return await function()
    except asyncio.CancelledError as error:
        if cancellation.has_cancelled_coroutine:
            raise TaskCancelled("The task was cancelled.") from error
        raise
    finally:
        cancellation.unwatch()
