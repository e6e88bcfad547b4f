"""
This module closes the pools and ends the streams at exit, and after SIGTERM or SIGINT.

A function that runs at exit is not enough. A server such as uvicorn waits for its open streams,
which wait for their tasks; and it ends by raising the signal again, after which no function runs at
exit. So a signal handler in front of the server's handler starts a thread that drains the pools,
ends the streams, and then sends the signal again to the server. Until then the server continues to
serve requests, and the streams send the `finished` event of each task.

SIGKILL, a crash of the interpreter and a loss of power end the process without these steps.
"""

from __future__ import annotations

import atexit
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, Protocol

from . import program_end, serving, signal_handlers
from .clocks import Clocks
from .forking import reset_in_child
from .hub import hub
from .logs import get_logger
from .new_thread import new_thread
from .waiting import limit_wait

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

logger = get_logger(__name__)

# After the tasks have finished, drain() gives the streams this many seconds to send their events.
STREAMS_END_TIMEOUT = 1.0
# After drain() the server gets this many seconds to send its buffered bytes, before
# _drain_and_raise() sends the server the exit signal again.
FLUSH_SECONDS = 0.1
# A wait for tasks at exit checks after this many seconds whether a signal has arrived. The handler
# of a signal cannot wake the wait, because it may interrupt a thread that holds any lock.
SIGNAL_CHECK_SECONDS = 0.1


class Closable(Protocol):
    """Declares the attributes and methods of a pool that this module uses."""

    alias: str
    options: Any

    def refuse(self) -> None:
        """Refuse new tasks, and fail and log the waiting ones."""

    def unfinished_tasks(self) -> Sequence[Any]:
        """Return the tasks that have no outcome yet."""

    def wait_until_idle(self, timeout: float) -> Sequence[Any]:
        """Wait for all tasks and receivers; return the tasks left after `timeout` seconds."""

    def drain(self, timeout: float) -> None:
        """Let running tasks finish for `timeout` seconds, then fail those that still run."""

    def close_workers(self) -> None:
        """Stop the workers. This method may block until they have ended."""


class _Exit:
    """Holds the open pools of this process, and which steps of its exit have begun or ended."""

    def __init__(self) -> None:
        self.pools: set[Any] = set()
        self.hook_registered = False  # True if drain_at_exit() will be called at exit.
        self.finalizer_registered = False  # True if _register_finalizer() was called.
        self.exiting = False  # True if the main thread has called drain_at_exit().
        self.signalled = False  # True if this process has received SIGTERM or SIGINT.
        self.interrupts = 0  # The number of Ctrl-C (SIGINT, SIGBREAK) that this process received.
        self.draining_thread: threading.Thread | None = None  # A signal handler has started it.
        self.draining = False  # True if drain() has begun; register() then returns False.
        self.passes_signals = False  # True if drain() has ended, so signals go to other handlers.
        self.drained = threading.Event()  # Set when drain() has ended.
        # Guards changes of `pools`, `draining` and the flags of the hooks. It is reentrant, because
        # a finalizer may enqueue a task, and so call register(), while its thread is in register().
        self.lock = threading.RLock()

    @property
    def hurries(self) -> bool:
        """Return whether a second Ctrl-C asks for an end without a wait for running tasks."""
        return self.interrupts > 1


_exit = _Exit()


def register(pool: Closable) -> bool:
    """
    Register a pool that drain() closes at exit; return False if the process is exiting already.

    If the pool is registered already, this function takes only two lookups.
    """
    serving.note_enqueue()
    if pool in _exit.pools:
        return True
    with _exit.lock:
        if _exit.draining:
            return False
        _exit.pools.add(pool)
        if not _exit.hook_registered:
            _exit.hook_registered = True
            _register_exit_hook()
            program_end.watch_exit_code()
        if not _exit.finalizer_registered:
            _exit.finalizer_registered = True
            _register_finalizer()
    signal_handlers.install_signal_handlers(at_exit=_exit.exiting)
    signal_handlers.warn_if_unhandled()
    return True


def _register_exit_hook() -> None:
    """
    Have the interpreter call drain_at_exit() when the main thread has ended.

    Executors refuse new work in an atexit function. They use the private hook of `threading`, which
    calls the last registered function first. A server that embeds Python may call only atexit's
    functions, and so may a thread that enqueues the first task after the main thread has ended.
    """
    atexit.register(drain_at_exit)
    try:
        threading._register_atexit(drain_at_exit)  # type: ignore[attr-defined]  # noqa: SLF001
    except (AttributeError, RuntimeError):
        logger.debug("The tasks of this process end in an atexit function.", exc_info=True)


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
    """Run the waiting tasks of a script, and call drain(). Called from: the ending main thread."""
    _exit.exiting = True
    if not _exit.draining and _exit.pools:
        may_run = _is_end_of_script()
        _exit.interrupts += program_end.is_interrupted()
        if not signal_handlers.are_left_alone():
            signal_handlers.install_signal_handlers(at_exit=True)
        if may_run:
            _run_tasks()
    drain()
    _exit.passes_signals = True


def _is_end_of_script() -> bool:
    """Return whether the main program has ended as it should, and nothing has asked it to end."""
    return not (
        serving.is_serving()
        or signal_handlers.are_left_alone()
        or signal_handlers.is_sigterm_handled_elsewhere()
        or _exit.signalled
        or program_end.has_failed()
    )


def _run_tasks() -> None:
    """Wait until all tasks have finished, also those that other tasks enqueue, or for a signal."""
    count = sum(len(pool.unfinished_tasks()) for pool in list(_exit.pools))
    if count:
        logger.info("The main program has ended; the process waits for %d task(s).", count)
    while not _exit.signalled and any(
        pool.wait_until_idle(SIGNAL_CHECK_SECONDS) for pool in list(_exit.pools)
    ):
        pass


def drain() -> None:
    """
    Fail the waiting tasks, let the running ones finish until their timeout, and end the streams.

    It is called at exit, and after a signal in a separate thread. If one call runs already, a
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
        # Wait for one pool after the other, in the order of their timeouts; tasks of the other
        # pools run on. No thread per pool is used, because Python 3.12 cannot start one at exit.
        began = Clocks.monotonic()
        for pool in pools:
            _safely(pool.refuse)
        _safely(_log_wait, pools)
        for pool in sorted(pools, key=lambda pool: pool.options.shutdown_timeout):
            _safely(_wait_for_tasks, pool, began + pool.options.shutdown_timeout)
            _safely(pool.drain, 0)
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


def _log_wait(pools: list[Closable]) -> None:
    """Log the tasks that delay the exit, because a process that waits looks like one that hangs."""
    tasks = [task for pool in pools for task in pool.unfinished_tasks()]
    timeout = max((p.options.shutdown_timeout for p in pools if p.unfinished_tasks()), default=0)
    if tasks and timeout and not _exit.hurries:
        logger.warning(
            "Waiting up to %g s for %d task(s): %s",
            timeout,
            len(tasks),
            ", ".join(f"{task.id} ({task.path})" for task in tasks),
        )


def _wait_for_tasks(pool: Closable, deadline: float) -> None:
    """Wait until a pool is idle; until `deadline`, or until a second Ctrl-C."""
    while not _exit.hurries and (left := deadline - Clocks.monotonic()) > 0:
        if not pool.wait_until_idle(min(left, SIGNAL_CHECK_SECONDS)):
            return


@signal_handlers.before_signal
def _take_signal(number: int, previous: signal_handlers.Handler) -> bool:
    """
    Start a thread that drains and sends the signal again; return False to call `previous`.

    The signal handler calls this in the main thread. The drain cannot run there, because the main
    thread may hold any lock, and must continue to serve the streams until they end.
    """
    if _exit.passes_signals:
        return False
    _exit.signalled = True
    if number != signal.SIGTERM:
        _exit.interrupts += 1
    # A repeated signal has no effect, but for a second Ctrl-C. Some programs pass a signal on to
    # their children, which receive it from the terminal or from systemd already.
    if _exit.exiting or _exit.draining_thread is not None:
        return True
    if not serving.may_serve() and callable(previous):
        # A command such as a scheduler ends by itself, and may need its tasks until then.
        return False
    thread = new_thread("django-tasks-drain", _drain_and_raise, number)
    _exit.draining_thread = thread
    try:
        thread.start()
    except RuntimeError:
        _exit.draining_thread = None
        return False  # The system has no thread left, or Python 3.12 has begun to exit.
    return True


def _drain_and_raise(number: int) -> None:
    try:
        drain()
    finally:  # Also after an error: without the second signal the server would never end.
        if not _exit.exiting:
            # Some servers, such as Daphne, exit at once when they receive the signal and discard
            # the bytes that they have not sent yet.
            time.sleep(FLUSH_SECONDS)
            _exit.passes_signals = True
            signal_handlers.send_to_this_process(number)


@reset_in_child
def _reset_in_child() -> None:
    """Replace the copy of the parent's state in a child of fork(), which has no pools yet."""
    global _exit
    parent, _exit = _exit, _Exit()
    _exit.hook_registered = parent.hook_registered
