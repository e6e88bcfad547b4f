"""
This module closes the pools and ends the streams at exit (atexit) and after SIGTERM or SIGINT.

atexit is not enough. A server such as uvicorn waits for its open streams, which wait for their
tasks; and it ends by raising the signal again, after which atexit does not run. So a signal handler
in front of the server's handler starts a thread that drains the pools, ends the streams, and then
sends the signal again to the server. Until then the server continues to serve requests, and the
streams send the `finished` event of each task.

SIGKILL, a crash of the interpreter and a loss of power end the process without these steps.
"""

from __future__ import annotations

import atexit
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from . import signal_handlers
from .clocks import Clocks
from .forking import reset_in_child
from .hub import hub
from .logs import get_logger
from .new_thread import new_thread
from .waiting import limit_wait

if TYPE_CHECKING:
    from collections.abc import Callable

logger = get_logger(__name__)

# After the tasks have finished, drain() gives the streams this many seconds to send their events.
STREAMS_END_TIMEOUT = 1.0
# After drain() the server gets this many seconds to send its buffered bytes, before
# _drain_and_raise() sends the server the exit signal again.
FLUSH_SECONDS = 0.1


class Closable(Protocol):
    """Declares the attributes and methods of a pool that drain() uses."""

    alias: str
    options: Any

    def refuse(self) -> None:
        """Refuse new tasks and fail the waiting ones."""

    def drain(self, timeout: float) -> None:
        """Let running tasks finish for `timeout` seconds, then fail those that still run."""

    def close_workers(self) -> None:
        """Stop the workers. This method may block until they have ended."""


class _Exit:
    """Holds the open pools of this process, and which steps of its exit have begun or ended."""

    def __init__(self) -> None:
        self.pools: set[Any] = set()
        self.hook_registered = False  # True if drain_at_exit() is registered with atexit.
        self.finalizer_registered = False  # True if _register_finalizer() was called.
        self.exiting = False  # True if the main thread has called drain_at_exit().
        self.draining = False  # True if drain() has begun; register() then returns False.
        self.drained = threading.Event()  # Set when drain() has ended.
        # Guards changes of `pools`, `draining` and the flags of the hooks. It is reentrant, because
        # a finalizer may enqueue a task, and so call register(), while its thread is in register().
        self.lock = threading.RLock()


_exit = _Exit()


def register(pool: Closable) -> bool:
    """
    Register a pool that drain() closes at exit; return False if the process is exiting already.

    If the pool is registered already, this function takes only one lookup in a set.
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
        if not _exit.finalizer_registered:
            _exit.finalizer_registered = True
            _register_finalizer()
    signal_handlers.install_signal_handlers()
    signal_handlers.warn_if_unhandled()
    return True


def _register_finalizer() -> None:
    """
    Have multiprocessing call drain_at_exit(), if it has started this process.

    Some servers serve in such processes. One that is started with fork() or by a fork server ends
    with os._exit(), so that atexit does not run.
    """
    process = sys.modules.get("multiprocessing.process")
    if process is not None and process.parent_process() is not None:
        from multiprocessing.util import Finalize

        Finalize(None, drain_at_exit, exitpriority=100)


def unregister(pool: Closable) -> None:
    """Remove a closed pool from those that drain() closes at exit."""
    _exit.pools.discard(pool)


def drain_at_exit() -> None:
    """Call drain() from atexit; the process ends afterwards, so no signal is sent again."""
    _exit.exiting = True
    drain()


def drain() -> None:
    """
    Fail the waiting tasks, let the running ones finish until their timeout, and end the streams.

    It is called from atexit, and after a signal in a separate thread. If one call runs already, a
    second call only waits until the first has ended.
    """
    with _exit.lock:
        is_first, _exit.draining = not _exit.draining, True
        # register() no longer finds a pool after this line, so enqueue() raises ShuttingDown for
        # every pool, although refuse() closes them one after the other.
        pools, _exit.pools = list(_exit.pools), set()
    if not is_first:
        while not _exit.drained.wait(limit_wait()):
            pass
        return
    try:
        for pool in pools:
            _safely(pool.refuse)
        # Wait for one pool after the other, in the order of their timeouts; tasks of the other
        # pools run on. No thread per pool is used, because Python 3.12 cannot start one at exit.
        began = Clocks.monotonic()
        for pool in sorted(pools, key=lambda pool: pool.options.shutdown_timeout):
            left = began + pool.options.shutdown_timeout - Clocks.monotonic()
            _safely(pool.drain, max(0, left))
        # The streams are ended after all pools are drained, so that they send the `finished` event
        # of every task first.
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
    Start a thread that drains and sends the signal again; return False if a drain has begun.

    The signal handler calls this in the main thread. The drain cannot run there, because the main
    thread may hold any lock, and must continue to serve the streams until they end.
    """
    if _exit.draining:
        return False
    new_thread("django-tasks-drain", _drain_and_raise, number).start()
    return True


def _drain_and_raise(number: int) -> None:
    try:
        drain()
    finally:  # Also after an error: without the second signal the server would never end.
        if not _exit.exiting:
            # Some servers, such as Daphne, exit at once when they receive the signal and discard
            # the bytes that they have not sent yet.
            time.sleep(FLUSH_SECONDS)
            signal_handlers.send_to_this_process(number)


@reset_in_child
def _reset_in_child() -> None:
    """Replace the copy of the parent's state in a child of fork(), which has no pools yet."""
    global _exit
    parent, _exit = _exit, _Exit()
    _exit.hook_registered = parent.hook_registered
