"""
The loop of the dispatcher's thread: waits for files, commands and deadlines, calls functions.

    select() --> handlers of files --> commands --> on_turn(), which returns the next deadline

It knows nothing of tasks and workers.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress
from contextvars import Context
from functools import partial
from typing import TYPE_CHECKING

from ..execution.connections import (
    close_old_resources,
    close_thread_resources,
    drop_stale_connections,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    type Watched = socket.socket | int
    type Handler = Callable[[int], object]  # called with selectors.EVENT_READ, EVENT_WRITE or both

logger = logging.getLogger(__name__)

MAX_SELECT_SECONDS = 3600.0  # epoll cannot wait for more than 24 days


class Loop:
    """One thread, its selector, and the commands that other threads have for it."""

    def __init__(
        self,
        name: str,
        on_turn: Callable[[], float | None],
        is_done: Callable[[], bool],
        on_end: Callable[[], object],
    ) -> None:
        """`on_turn` is called in each turn; it returns the time of the next one, or None."""
        self._on_turn = on_turn
        self._is_done = is_done
        self._on_end = on_end
        self._commands: deque[Callable[[], object]] = deque()
        self._wake_pending = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        with ExitStack() as undo:
            self._selector = undo.enter_context(selectors.DefaultSelector())
            self._wake_recv, self._wake_send = map(undo.enter_context, socket.socketpair())
            self._wake_recv.setblocking(False)
            self._wake_send.setblocking(False)
            self._selector.register(self._wake_recv, selectors.EVENT_READ, self._on_wake)
            undo.pop_all()

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if the system refuses it."""
        self._thread.start()

    # Called from any thread

    def post(self, command: Callable[..., object], *args: object) -> None:
        """Have the loop's thread call this."""
        self._commands.append(partial(command, *args))
        self.wake()

    def wake(self) -> None:
        """Have the loop's thread make a turn."""
        # Unlocked: the loop resets the flag before it checks commands and queues, so it finds
        # everything that was added before. Two wake-ups at once are harmless.
        if not self._wake_pending:
            with suppress(OSError):  # The loop has ended.
                # No call between the two lines: an interrupt there would disable later wake-ups.
                self._wake_pending = True
                self._wake_send.send(b"\0")

    def join(self) -> None:
        """Wait until the thread has ended; in the thread itself, return at once."""
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def close(self) -> None:
        """Close the loop's files. Called at its end, or in a child of fork(), where it is dead."""
        self._selector.close()
        self._wake_recv.close()
        self._wake_send.close()

    # Called in the loop's thread

    def watch(self, file: Watched, handler: Handler) -> None:
        """Call the handler when the file can be read. Raises OSError."""
        self._selector.register(file, selectors.EVENT_READ, handler)

    def watch_writing(self, file: Watched, wanted: bool) -> None:
        """Call the handler of a watched file also when it can be written, or no longer."""
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if wanted else 0)
        with suppress(KeyError, ValueError):  # The file is not watched any longer.
            self._selector.modify(file, events, self._selector.get_key(file).data)

    def unwatch(self, file: Watched) -> None:
        """Forget a file, if it is watched."""
        with suppress(KeyError, ValueError):  # ValueError: the file is closed.
            self._selector.unregister(file)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call a function; an exception is logged and does not end the thread."""
        try:
            function(*args)
        except BaseException:
            # A bug of this package, or a SystemExit: the other workers' tasks must go on.
            logger.exception("An error in the dispatcher of the task backend.")

    def _run(self) -> None:
        timeout: float | None = None
        try:
            while not self._is_done():
                ready = self._selector.select(timeout)
                # An empty context for each turn, because log handlers may leave variables in it.
                timeout = Context().run(self._turn, ready)
        except BaseException:
            logger.exception("The thread %r failed.", self._thread.name)
        finally:
            self._on_end()
            self.close()
            close_thread_resources()

    def _turn(self, ready: list[tuple[selectors.SelectorKey, int]]) -> float | None:
        drop_stale_connections()
        for key, events in ready:
            self.call(key.data, events)
        while self._commands:
            self.call(self._commands.popleft())
        due_at = self._on_turn()
        close_old_resources()
        if due_at is None:
            return None
        return min(max(0.0, due_at - time.monotonic()), MAX_SELECT_SECONDS)

    def _on_wake(self, events: int) -> None:
        self._wake_recv.recv(64)
        self._wake_pending = False
