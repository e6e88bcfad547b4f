"""
Run the loop of the dispatcher's thread, which waits for files, commands and deadlines.

    select() --> handlers of files --> commands --> on_turn(), which returns the next deadline

This module does not depend on tasks and workers; the dispatcher supplies the handlers.
"""

from __future__ import annotations

import selectors
import threading
from collections import deque
from contextlib import ExitStack, suppress
from functools import partial
from multiprocessing import connection
from typing import TYPE_CHECKING

from ..clocks import Clocks
from ..logs import get_logger, write_in_other_thread
from ..new_thread import new_thread
from ..waiting import limit_wait
from . import facilities
from .connection import socketpair

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    type Watched = socket.socket | int
    type Handler = Callable[[int], object]  # The argument is EVENT_READ, EVENT_WRITE or both.

logger = get_logger(__name__)

# While a deadline is due, the thread wakes at least this often, so that it measures how long its
# process was suspended. (epoll accepts at most 24 days.)
MAX_SELECT_SECONDS = 5.0
# If the thread wakes later than requested by more than this number of seconds, the process was
# suspended: by SIGSTOP, a paused container or a laptop's sleep. A busy machine delays it for less.
SUSPENSION_SECONDS = 5.0


class Loop:
    """Runs one thread that calls handlers of ready files, and commands of other threads."""

    def __init__(
        self,
        name: str,
        on_turn: Callable[[], float | None],
        is_done: Callable[[], bool],
        on_end: Callable[[BaseException | None], object],
        on_suspension: Callable[[float], object],
        clock: Callable[[], float] = Clocks.monotonic,
        write_log: Callable[..., object] | None = None,
    ) -> None:
        """
        Open the selector and the sockets for wake(). Raises OSError.

        The thread calls `on_turn` at the end of each turn; it returns the time of the next turn, or
        None. The thread ends when `is_done` returns True, or after an error in this class. It then
        calls `on_end` with the error or None. Before the first turn after a suspension of
        the process it calls `on_suspension` with its seconds. `write_log(function, *args)` has
        another thread call log handlers.
        """
        self._on_turn = on_turn
        self._is_done = is_done
        self._on_end = on_end
        self._on_suspension = on_suspension
        self._clock = clock
        self._write_log = write_log
        self._commands: deque[Callable[[], object]] = deque()
        self._wake_pending = False
        self._was_woken = False  # Only the loop's thread uses it.
        self._thread = new_thread(name, self._run)
        with ExitStack() as undo:
            self._selector = undo.enter_context(selectors.DefaultSelector())
            self._wake_recv, self._wake_send = map(undo.enter_context, socketpair())
            self._wake_recv.setblocking(False)
            self._wake_send.setblocking(False)
            self._selector.register(self._wake_recv, selectors.EVENT_READ, self._on_wake)
            undo.pop_all()

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if the system cannot start a thread."""
        self._thread.start()

    # Any thread may call the methods below.

    def post(self, command: Callable[..., object], *args: object) -> None:
        """Wake the loop's thread and let it call `command` with `args`."""
        self._commands.append(partial(command, *args))
        # Unlocked: the loop resets `_wake_pending` before it takes the commands, so it finds every
        # command that was added while the flag was True. Without a GIL, append() and popleft() lock
        # the deque, which orders them and the flag. Two concurrent wake-ups are harmless.
        if not self._wake_pending:
            with suppress(OSError):  # The loop has ended.
                # Put no call between these two lines: if it raised KeyboardInterrupt, the flag
                # would stay True without a byte in the socket, and nothing would wake the thread.
                self._wake_pending = True
                self._wake_send.send(b"\0")

    def wake(self) -> None:
        """Wake the loop's thread, so that it calls `on_turn` without delay."""
        # Without a GIL, the command has `on_turn` see what this thread has changed before.
        self.post(_do_nothing)

    def join(self) -> None:
        """Wait until the loop's thread has ended; return at once if this thread calls join()."""
        if threading.current_thread() is not self._thread:
            while self._thread.is_alive():
                self._thread.join(limit_wait())

    def close(self) -> None:
        """Close the selector and sockets. Called from: the loop's end, or a child of fork()."""
        self._selector.close()
        self._wake_recv.close()
        self._wake_send.close()

    # Only the loop's thread calls the methods below.

    def watch(self, file: Watched, handler: Handler) -> None:
        """Call `handler` whenever the file is readable. Raises OSError if that is impossible."""
        self._selector.register(file, selectors.EVENT_READ, handler)

    def watch_writing(self, file: Watched, wanted: bool) -> None:
        """Start or stop calling the handler of a watched file also when the file is writable."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        with suppress(KeyError, ValueError):  # The loop no longer watches the file.
            self._selector.modify(file, events, self._selector.get_key(file).data)

    def unwatch(self, file: Watched) -> None:
        """Stop watching a file; without effect if the loop does not watch it."""
        with suppress(KeyError, ValueError):  # ValueError: the file is closed.
            self._selector.unregister(file)

    def watch_end(self, sentinel: int, handler: Handler) -> None:
        """
        Call `handler` when the process with this sentinel has ended.

        Where a selector accepts only sockets, a thread waits for the sentinel; the caller must not
        close it before the call. Raises OSError or RuntimeError if the process cannot be watched.
        """
        if facilities.SELECTS_SENTINELS:
            self.watch(sentinel, handler)
        else:
            name = self._thread.name + "-end"
            new_thread(name, self._wait_for_end, sentinel, handler).start()

    def unwatch_end(self, sentinel: int) -> None:
        """Stop watching a sentinel after its handler was called."""
        # On Windows the number of a sentinel may also be the number of a socket.
        if facilities.SELECTS_SENTINELS:
            self.unwatch(sentinel)

    def call(self, function: Callable[..., object], *args: object) -> bool:
        """
        Call a function; return False if it has raised an exception, which this method logs.

        The thread continues after any exception, to serve the tasks of the other workers.
        """
        try:
            function(*args)
        except BaseException:
            logger.exception("An error in the dispatcher: the thread %r.", self._thread.name)
            return False
        return True

    def _wait_for_end(self, sentinel: int, handler: Handler) -> None:
        connection.wait([sentinel])
        self.post(handler, selectors.EVENT_READ)

    def _run(self) -> None:
        timeout: float | None = None
        failure: BaseException | None = None
        if self._write_log is not None:
            write_in_other_thread(self._write_log)
        try:
            while not self._is_done():
                began = self._clock()
                ready = self._selector.select(timeout)
                seconds = self._clock() - began
                was_suspended = timeout is not None and seconds - timeout > SUSPENSION_SECONDS
                timeout = self._turn(ready, seconds if was_suspended else 0.0)
        except BaseException as error:
            logger.exception("The thread %r has ended because of an error.", self._thread.name)
            failure = error
        self.call(self._on_end, failure)
        self.call(self.close)

    def _turn(
        self, ready: list[tuple[selectors.SelectorKey, int]], suspended: float
    ) -> float | None:
        if suspended:
            self.call(self._on_suspension, suspended)
        for key, events in ready:
            self.call(key.data, events)
        if self._was_woken or self._commands:
            self._was_woken = False
            self._run_commands()
        due_at = self._on_turn()
        if due_at is None:
            return None
        return min(max(0.0, due_at - self._clock()), MAX_SELECT_SECONDS)

    def _run_commands(self) -> None:
        # Take commands until popleft() raises, because the length of a deque orders nothing.
        with suppress(IndexError):
            while True:
                self.call(self._commands.popleft())

    def _on_wake(self, events: int) -> None:
        self._wake_recv.recv(64)
        self._wake_pending = False
        self._was_woken = True


def _do_nothing() -> None:
    """Serve as the command of wake()."""
