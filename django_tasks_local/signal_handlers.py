"""
Handlers for SIGTERM and SIGINT in front of those of the server. Imports `forking` only.

The first signal is passed to the function that `before_signal` was given, which later sends it
again. The handler that was installed before gets the signals that the function does not take.

A child of fork() has the handlers that the parent had before: it may belong to any library, such
as multiprocessing.Pool, which ends its children by SIGTERM.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import asyncio
import os
import signal
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from .forking import reset_in_child

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    type Handler = Callable[[int, FrameType | None], Any] | int | None

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def _take_no_signal(number: int) -> bool:
    return False


class _State:
    """The signal handlers of this process."""

    def __init__(self) -> None:
        self.take_signal: Callable[[int], bool] = _take_no_signal
        self.may_install = True
        # For each signal: the handler that this module has installed, and the one before it.
        self.installed: dict[int, tuple[Handler, Handler]] = {}


_state = _State()


def before_signal(take_signal: Callable[[int], bool]) -> Callable[[int], bool]:
    """
    Set the function that is called with each signal; if it returns False, the next handler is.

    A decorator. The function runs in the main thread, between any two instructions of it.
    """
    _state.take_signal = take_signal
    return take_signal


def leave_signals_alone() -> None:
    """Install no handlers in this process: it is a worker, and its parent decides when it ends."""
    _state.may_install = False


def install_signal_handlers() -> None:
    """
    Put a handler in front of the present ones; has no effect outside of the main thread.

    May be called again, because a server may install its own handlers after the first call.
    """
    if not _state.may_install:
        return
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        present = signal.getsignal(number)
        if not _is_left_alone(present) and not isinstance(present, _Handler):
            # A sub-interpreter, as of mod_wsgi, may not install one in its main thread either.
            with suppress(ValueError):
                install(number, _Handler(present))


def _is_left_alone(handler: Any) -> bool:
    """Whether this module cannot, or need not, put a handler in front of this one."""
    # None: installed by code that is not Python, which a handler here could not call.
    # The default for SIGINT raises KeyboardInterrupt, which leads to atexit, or is caught: then an
    # interactive prompt, for example, continues and needs its tasks. While asyncio.run() is
    # active, it installs a SIGINT handler with the same effect.
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    return handler in (None, signal.SIG_IGN, signal.default_int_handler) or isinstance(
        owner, asyncio.Runner
    )


def install(number: int, handler: Handler) -> None:
    """
    Install a signal handler that a child of fork() does not inherit.

    Called in the main thread.
    """
    _state.installed[number] = handler, signal.signal(number, handler)


class _Handler:
    """A handler in front of another one. Each installation has its own, so chains stay chains."""

    def __init__(self, previous: Handler) -> None:
        self._previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. Runs in the main thread, between any two instructions of it."""
        if _state.take_signal(number):
            return
        # The drain is over and sends the signal again, or a user who does not want to wait does.
        if callable(self._previous):
            self._previous(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@reset_in_child
def _reset_in_child() -> None:
    """Restore the handlers that the parent had before; the next pool installs new ones."""
    for number, (ours, previous) in _state.installed.items():
        if signal.getsignal(number) == ours:
            signal.signal(number, previous)
    _state.installed.clear()


# During a fork() both signals are blocked, so that one that is sent to the child waits until
# _reset_in_child() has run. This set has those of SIGNALS that no other code had blocked before.
_blocked: set[int] = set()


def _block_signals() -> None:
    """Run before a fork()."""
    _blocked.clear()
    _blocked.update({*SIGNALS} - signal.pthread_sigmask(signal.SIG_BLOCK, ()))
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


if hasattr(os, "register_at_fork"):
    # A C function, registered on its own: a signal handler could raise before the first line of a
    # Python function runs, and the signals would stay blocked. In the child it runs after the
    # functions of `forking`, which has registered its hook earlier.
    _unblock_signals = partial(_signal.pthread_sigmask, signal.SIG_UNBLOCK, _blocked)
    os.register_at_fork(before=_block_signals)
    os.register_at_fork(after_in_parent=_unblock_signals, after_in_child=_unblock_signals)
