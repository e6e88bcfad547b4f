"""
This module installs handlers for SIGTERM and SIGINT in front of the handlers of the server.

Each signal is first passed to the function that was set with `before_signal`. If that function
returns False, the handler that was installed before gets the signal.

In a child of fork() the handlers that the parent had before are restored. The child may belong to
any library, such as multiprocessing.Pool, which ends its children with SIGTERM.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]
import asyncio
import os
import signal
import sys
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from .forking import reset_in_child
from .logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

    type Handler = Callable[[int, FrameType | None], Any] | int | None

logger = get_logger(__name__)

SIGNALS = [signal.SIGTERM, signal.SIGINT]
if sys.platform == "win32":
    SIGNALS.append(signal.SIGBREAK)  # Ctrl-Break, with which Django's runserver asks to be ended


def _take_no_signal(number: int, previous: Handler) -> bool:
    return False


class _State:
    """Holds the signal handlers that this module has installed in this process."""

    def __init__(self) -> None:
        self.take_signal: Callable[[int, Handler], bool] = _take_no_signal
        self.may_install = True
        self.warned = False  # True if warn_if_unhandled() has logged its WARNING.
        # The key is a signal number; the value is the handler that this module has installed, and
        # the handler that was installed before.
        self.installed: dict[int, tuple[Handler, Handler]] = {}
        # The handler for which take_signal() has returned True, by the signal's number. If the
        # signal is sent again, it goes from that handler to the one before: a handler between two
        # of this module may have been called already.
        self.takers: dict[int, _Handler] = {}


_state = _State()


def before_signal(
    take_signal: Callable[[int, Handler], bool],
) -> Callable[[int, Handler], bool]:
    """
    Set the function that is called with each signal before the handler that was installed before.

    Its arguments are the number of the signal and that handler. That handler is called only if the
    function returns False. Use this as a decorator. Python calls the function in the main thread,
    where it may interrupt any code.
    """
    _state.take_signal = take_signal
    return take_signal


def leave_signals_alone() -> None:
    """Disable install_signal_handlers(), in a worker process, which its parent process ends."""
    _state.may_install = False


def are_left_alone() -> bool:
    """Return whether leave_signals_alone() was called, because this is a worker process."""
    return not _state.may_install


def is_sigterm_handled_elsewhere() -> bool:
    """Return whether other code has replaced the handler of this module, or the default action."""
    present = signal.getsignal(signal.SIGTERM)
    _, before = _state.installed.get(signal.SIGTERM, (None, signal.SIG_DFL))
    return not isinstance(present, _Handler) and present not in (before, signal.SIG_IGN)


def install_signal_handlers(*, at_exit: bool = False) -> None:
    """
    Install a handler in front of each present one; do nothing outside of the main thread.

    May be called again, because a server may install its own handlers after the first call. With
    `at_exit` the main program has ended, and Ctrl-C must not raise KeyboardInterrupt.
    """
    if not _state.may_install:
        return
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        present = signal.getsignal(number)
        replaces_default = at_exit and present is signal.default_int_handler
        if isinstance(present, _Handler):
            continue
        if replaces_default or not _is_left_alone(present):
            # signal.signal() raises ValueError in a sub-interpreter, as mod_wsgi uses it, even in
            # its main thread.
            with suppress(ValueError):
                install(number, _Handler(present))


def warn_if_unhandled() -> None:
    """Log one WARNING if SIGTERM would end this process without a drain."""
    if (
        not _state.may_install
        or _state.warned
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        return
    _state.warned = True
    logger.warning(
        "No handler for SIGTERM is installed, because the first task was enqueued outside of the "
        "main thread. SIGTERM would end this process without a report of its lost tasks. Add "
        "'django_tasks_local' to INSTALLED_APPS."
    )


def _is_left_alone(handler: Any) -> bool:
    """Return whether this module cannot, or need not, put a handler in front of this one."""
    # getsignal() returns None for a handler that C code has installed; Python cannot call it.
    # The default handler for SIGINT raises KeyboardInterrupt. If no code catches it, the process
    # exits and atexit calls drain(). If code does, as an interactive prompt, the process continues
    # and needs its tasks. While asyncio.run() is active, its SIGINT handler has the same effect.
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    return handler in (None, signal.SIG_IGN, signal.default_int_handler) or isinstance(
        owner, asyncio.Runner
    )


def install(number: int, handler: Handler) -> None:
    """
    Install a signal handler, in whose place a child of fork() gets the handler before it.

    Must be called in the main thread.
    """
    _state.installed[number] = handler, signal.signal(number, handler)


def send_to_this_process(number: int) -> None:
    """
    Send a signal to the main thread of this process. Called from: any thread.

    With os.kill() the kernel may run the handler in C in another thread. The main thread, in which
    Python calls its own handlers, then continues to sleep if it waits for a lock. On Windows,
    os.kill() would end the process without calling any handler.
    """
    if sys.platform == "win32":
        signal.raise_signal(number)
    else:
        main = threading.main_thread().ident
        assert main is not None
        signal.pthread_kill(main, number)


class _Handler:
    """
    A signal handler that may pass the signal on to the handler that was installed before it.

    Each installation creates a new object, so that no handler in a chain can be its own successor.
    """

    def __init__(self, previous: Handler) -> None:
        self._previous = previous

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal. Python calls this in the main thread, between any two instructions."""
        if _state.take_signal(number, self._previous):
            _state.takers.setdefault(number, self)
            return
        _state.takers.get(number, self).pass_on(number, frame)

    def pass_on(self, number: int, frame: FrameType | None) -> None:
        """Call the handler that was installed before."""
        if callable(self._previous):
            self._previous(number, frame)
        else:
            signal.signal(number, signal.SIG_DFL)
            send_to_this_process(number)


@reset_in_child
def _reset_in_child() -> None:
    """Restore the parent's former handlers in a child of fork(); a new pool installs new ones."""
    for number, (ours, previous) in _state.installed.items():
        if signal.getsignal(number) == ours:
            signal.signal(number, previous)
    _state.installed.clear()
    _state.takers.clear()


# During a fork() both signals are blocked, so that a signal that is sent to the child waits until
# _reset_in_child() has run. This set has those of SIGNALS that other code has not blocked already;
# only these are unblocked afterwards.
_blocked: set[int] = set()


if sys.platform != "win32" and hasattr(os, "register_at_fork"):

    def _block_signals() -> None:
        """Block SIGNALS in the thread that is about to call fork()."""
        _blocked.clear()
        _blocked.update({*SIGNALS} - signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    # This is a C function, because a signal handler could raise before the first line of a Python
    # function runs, and the signals would stay blocked. In the child it runs after the functions of
    # the module `forking`, which registers its hook earlier.
    _unblock_signals = partial(_signal.pthread_sigmask, signal.SIG_UNBLOCK, _blocked)
    os.register_at_fork(before=_block_signals)
    os.register_at_fork(after_in_parent=_unblock_signals, after_in_child=_unblock_signals)
