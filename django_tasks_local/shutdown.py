"""
The one road out of the process: from atexit, and from SIGTERM and SIGINT.

atexit is not enough. A server such as uvicorn waits for its open streams, which wait for their
tasks; and it ends by raising the signal once more, when atexit does not run. So a handler in
front of the server's own drains the pools and ends the streams, and then lets the server go on.
Until then the server knows of nothing and serves: a stream tells what becomes of the last task.

What is not covered: SIGKILL, a crash of the interpreter, power.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import asyncio
import atexit
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from .hub import hub

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    type Handler = Callable[[int, FrameType | None], Any] | int | None

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
STREAMS_END = 1.0  # seconds for the streams to tell the ends of their tasks
FLUSH = 0.1  # seconds from there until that has left the server


class Closable(Protocol):
    """What the drain needs of a pool."""

    alias: str
    options: Any

    def refuse(self) -> None:
        """Refuse new tasks and fail the waiting ones."""

    def drain(self, timeout: float) -> None:
        """Let running tasks finish for `timeout` seconds, and fail what still runs then."""

    def close_workers(self) -> None:
        """Stop the workers. It may take a while, when they do not want to."""


class _Exit:
    """What is open in this process, and how far its end has come."""

    def __init__(self) -> None:
        self.pools: set[Any] = set()
        self.handles_signals = True
        self.at_exit = False
        self.is_at_exit = False
        self.draining = False
        self.drained = threading.Event()
        # Guards the above: there is one drain, and no pool slips in behind it.
        self.lock = threading.Lock()


_exit = _Exit()
_installed: dict[int, tuple[Handler, Handler]] = {}  # by signal: ours, and the one before it


def register(pool: Closable) -> bool:
    """
    Have this pool closed when the process ends; False if it is ending already.

    Cheap when the pool is known.
    """
    if pool in _exit.pools:
        return True
    with _exit.lock:
        if _exit.draining:
            return False
        _exit.pools.add(pool)
        if not _exit.at_exit:
            _exit.at_exit = True
            atexit.register(drain_at_exit)
    install_signal_handlers()
    return True


def unregister(pool: Closable) -> None:
    """Forget a pool that was closed."""
    _exit.pools.discard(pool)


def leave_signals_alone() -> None:
    """Install no handlers in this process: it is a worker, and its parent decides when it ends."""
    _exit.handles_signals = False


def install_signal_handlers() -> None:
    """
    Put our handler in front of the present ones; nothing happens outside of the main thread.

    May be called again: a server may have installed its own in the meantime.
    """
    if not _exit.handles_signals:
        return
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        present = signal.getsignal(number)
        if not _is_left_alone(present) and not isinstance(present, _Handler):
            # A sub-interpreter, as of mod_wsgi, has a main thread that may not.
            with suppress(ValueError):
                install(number, _Handler(present))


def _is_left_alone(handler: Any) -> bool:
    """Whether we cannot, or need not, be in front of this handler."""
    # None: installed by something that is not Python, which we could not call.
    # The default for SIGINT raises KeyboardInterrupt, which ends the process by way of atexit, or
    # is caught: then an interactive prompt, for one, goes on and wants its tasks. asyncio.run() has
    # a handler for its time that comes to the same.
    asyncios = getattr(getattr(handler, "func", None), "__self__", None)
    return handler in (None, signal.SIG_IGN, signal.default_int_handler) or isinstance(
        asyncios, asyncio.Runner
    )


def install(number: int, handler: Handler) -> None:
    """
    Install a signal handler, which a child of fork() does not inherit. For the main thread.

    The child may be anybody's, such as multiprocessing.Pool's, which ends its children by SIGTERM.
    """
    _installed[number] = handler, signal.signal(number, handler)


def drain_at_exit() -> None:
    """See drain(). Called when the main thread is on its way out, and needs no signal any more."""
    _exit.is_at_exit = True
    drain()


def drain() -> None:
    """
    Fail the waiting tasks, let the running ones finish in their time, and end the streams.

    Called from atexit, or in a thread of its own after a signal; whoever comes second waits.
    """
    with _exit.lock:
        first, _exit.draining = not _exit.draining, True
        pools = list(_exit.pools)
    if not first:
        _exit.drained.wait()
        return
    try:
        for pool in pools:
            _safely(pool.refuse)
        # One after the other, because the tasks of all of them run on in the meantime. Not in
        # threads: at exit Python 3.12 cannot start one any more.
        began = time.monotonic()
        for pool in sorted(pools, key=lambda pool: pool.options.shutdown_timeout):
            left = began + pool.options.shutdown_timeout - time.monotonic()
            _safely(pool.drain, max(0, left))
        # Not earlier, so that the streams tell what has become of every task.
        _safely(hub.end, STREAMS_END)
        for pool in pools:
            _safely(pool.close_workers)
    finally:
        _exit.drained.set()


def _safely(step: Callable[..., object], *args: object) -> None:
    try:
        step(*args)
    except Exception:
        logger.exception("The task backends could not be closed in good order.")


class _Handler:
    """Our handler in front of another one. Each installation has its own, so chains stay chains."""

    def __init__(self, previous: Handler) -> None:
        self._previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. Runs in the main thread, between any two instructions of it."""
        if _exit.draining:
            # The drain is over, or somebody is impatient and has sent the signal again.
            self._chain(number, frame)
        else:
            # In a thread, because the main thread may hold any lock just now, and must go on to
            # serve the streams until they end.
            threading.Thread(
                target=_drain_and_raise, args=(number,), name="django-tasks-drain", daemon=True
            ).start()

    def _chain(self, number: int, frame: FrameType | None) -> None:
        if callable(self._previous):
            self._previous(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _drain_and_raise(number: int) -> None:
    drain()
    if not _exit.is_at_exit:
        # Daphne, for one, ends at once and sends nothing more, not even what it has been given.
        time.sleep(FLUSH)
        os.kill(os.getpid(), number)


_held: set[int] = set()  # of SIGNALS, those that nobody else had blocked


def _hold_signals() -> None:
    """Before a fork(): what is sent to the child before it has its handlers must wait."""
    _held.update({*SIGNALS} - signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


def _start_anew() -> None:
    """In a child of fork(): nothing is open; handlers are installed when there is a pool again."""
    global _exit
    parent, _exit = _exit, _Exit()
    _exit.at_exit, _exit.handles_signals = parent.at_exit, parent.handles_signals
    for number, (ours, previous) in _installed.items():
        if signal.getsignal(number) == ours:
            signal.signal(number, previous)
    _installed.clear()


if hasattr(os, "register_at_fork"):
    # In C, and by itself: anybody's handler may raise in a function in Python before it has begun.
    _let_signals_go = partial(_signal.pthread_sigmask, signal.SIG_UNBLOCK, _held)
    os.register_at_fork(before=_hold_signals, after_in_child=_start_anew)
    os.register_at_fork(after_in_parent=_let_signals_go, after_in_child=_let_signals_go)
