"""Run the coroutine of a task in the calling thread, in a new event loop."""

from __future__ import annotations

import asyncio
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from asgiref.sync import SyncToAsync, ThreadSensitiveContext
from django.core.cache import close_caches

from ..exceptions import TaskCancelled
from . import connections
from .daemon_threads import DaemonExecutor, new_event_loop

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
    # Thread-sensitive sync code of this task, such as the ORM's, runs in this executor's thread.
    executor = DaemonExecutor(max_workers=1)
    key = ThreadSensitiveContext()
    token = SyncToAsync.thread_sensitive_context.set(key)
    SyncToAsync.context_to_thread_executor[key] = executor
    context = copy_context()
    try:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(_watch(function, cancellation), context=context)
    finally:
        del SyncToAsync.context_to_thread_executor[key]
        SyncToAsync.thread_sensitive_context.reset(token)
        context.run(connections.try_to, close_caches)
        if executor.has_threads:
            executor.submit(connections.close_thread_resources).result()
        executor.shutdown(wait=False)


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
