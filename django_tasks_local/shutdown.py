"""
The end of the process: close the pools, end the streams. From atexit, and from SIGTERM and SIGINT.

atexit is not enough. A server such as uvicorn waits for its open streams, which wait for their
tasks; and it ends by raising the signal again, after which atexit does not run. So a handler in
front of the server's own drains the pools and ends the streams, and then sends the signal again,
for the server. Until then the server continues to serve, and the streams send the end of each task.

Not covered: SIGKILL, a crash of the interpreter, a loss of power.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from . import signal_handlers
from .forking import reset_in_child
from .hub import hub

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

STREAMS_END_TIMEOUT = 1.0  # seconds in which the streams send the ends of their tasks
FLUSH_SECONDS = 0.1  # seconds after that in which the server sends its last bytes


class Closable(Protocol):
    """A pool, as the drain needs it."""

    alias: str
    options: Any

    def refuse(self) -> None:
        """Refuse new tasks and fail the waiting ones."""

    def drain(self, timeout: float) -> None:
        """Let running tasks finish for `timeout` seconds, then fail those that still run."""

    def close_workers(self) -> None:
        """Stop the workers. May block until they have ended."""


class _Exit:
    """The open pools of this process, and how far its end has come."""

    def __init__(self) -> None:
        self.pools: set[Any] = set()
        self.hook_registered = False  # drain_at_exit() is registered with atexit.
        self.exiting = False  # The main thread is in drain_at_exit().
        self.draining = False  # A drain has begun; no further pool is registered.
        self.drained = threading.Event()
        # Guards the attributes above. Reentrant, because a finalizer may enqueue a task, and so
        # call register(), while its thread is in register().
        self.lock = threading.RLock()


_exit = _Exit()


def register(pool: Closable) -> bool:
    """
    Have this pool closed when the process ends; False if the process is ending already.

    Costs one lookup if the pool is registered already.
    """
    if pool in _exit.pools:
        return True
    with _exit.lock:
        if _exit.draining:
            return False
        _exit.pools.add(pool)
        if not _exit.hook_registered:
            _exit.hook_registered = True
            atexit.register(drain_at_exit)
    signal_handlers.install_signal_handlers()
    return True


def unregister(pool: Closable) -> None:
    """Forget a pool that was closed."""
    _exit.pools.discard(pool)


def drain_at_exit() -> None:
    """See drain(). Called when the main thread ends, which needs no signal for that."""
    _exit.exiting = True
    drain()


def drain() -> None:
    """
    Fail the waiting tasks, let the running ones finish until their timeout, and end the streams.

    Called from atexit, or in a thread of its own after a signal. The second caller waits for the
    first.
    """
    with _exit.lock:
        is_first, _exit.draining = not _exit.draining, True
        pools = list(_exit.pools)
    if not is_first:
        _exit.drained.wait()
        return
    try:
        for pool in pools:
            _safely(pool.refuse)
        # One pool after the other; the tasks of the other pools continue to run. Not in threads,
        # because Python 3.12 cannot start a thread at exit.
        began = time.monotonic()
        for pool in sorted(pools, key=lambda pool: pool.options.shutdown_timeout):
            left = began + pool.options.shutdown_timeout - time.monotonic()
            _safely(pool.drain, max(0, left))
        # Not earlier, so that the streams send the end of every task.
        _safely(hub.end, STREAMS_END_TIMEOUT)
        for pool in pools:
            _safely(pool.close_workers)
    finally:
        _exit.drained.set()


def _safely(step: Callable[..., object], *args: object) -> None:
    try:
        step(*args)
    except Exception:
        logger.exception("The task backends could not be closed in good order.")


@signal_handlers.before_signal
def _start_drain(number: int) -> bool:
    """
    Drain, and send the signal again; False if a drain has begun already.

    In a thread, because the main thread, which runs signal handlers, may hold any lock, and must
    continue to serve the streams until they end.
    """
    if _exit.draining:
        return False
    threading.Thread(
        target=_drain_and_raise, args=(number,), name="django-tasks-drain", daemon=True
    ).start()
    return True


def _drain_and_raise(number: int) -> None:
    drain()
    if not _exit.exiting:
        # Daphne, for one, ends at once and discards the bytes that it has not sent yet.
        time.sleep(FLUSH_SECONDS)
        os.kill(os.getpid(), number)


@reset_in_child
def _reset_in_child() -> None:
    """Forget the parent's pools; they and their drain do not exist in this process."""
    global _exit
    parent, _exit = _exit, _Exit()
    _exit.hook_registered = parent.hook_registered
