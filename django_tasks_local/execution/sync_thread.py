"""Give the sync code that event loops of a task call a thread that ends with the task."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from asgiref.sync import SyncToAsync, ThreadSensitiveContext

from . import connections
from .daemon_threads import DaemonExecutor

if TYPE_CHECKING:
    from contextvars import Token


class _Worker(threading.local):
    """Holds the executor of each thread that runs tasks, and the key by which asgiref finds it."""

    key: ThreadSensitiveContext | None = None
    executor: DaemonExecutor


_worker = _Worker()


def enter_task() -> Token[ThreadSensitiveContext]:
    """
    Let thread-sensitive sync code of this task, such as the ORM's, run in one daemon thread.

    Coroutine tasks call such code, and so do sync tasks that call asyncio.run(). Without this
    function asgiref would use one thread for all tasks of the process, whose database connections
    nobody would close. The executor stays for the next task until it has started its thread,
    because making one takes longer than the rest of this function.
    """
    key = _worker.key
    if key is None:
        key = ThreadSensitiveContext()
        _worker.executor = DaemonExecutor(max_workers=1)
        SyncToAsync.context_to_thread_executor[key] = _worker.executor
        _worker.key = key
    return SyncToAsync.thread_sensitive_context.set(key)


def leave_task(token: Token[ThreadSensitiveContext]) -> None:
    """Close the connections and caches of the task's thread, if it was started, and end it."""
    SyncToAsync.thread_sensitive_context.reset(token)
    key = _worker.key
    if key is None or not _worker.executor.has_threads:
        return
    executor = _worker.executor
    _worker.key = None
    del SyncToAsync.context_to_thread_executor[key]
    executor.submit(connections.close_thread_resources).result()
    executor.shutdown(wait=False)
