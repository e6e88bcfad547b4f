"""The parent's ends of a worker's socket and pipes: bytes in both directions, and nothing waits."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from .wire import READ_SIZE, FrameReader, decode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from .tickets import Tickets
    from .wire import WorkerMessage


class WorkerConnection:
    """The connection to one worker. Any thread may send; only the dispatcher's thread receives."""

    def __init__(
        self, sock: socket.socket, lifeline: Connection, tickets: Tickets | None = None
    ) -> None:
        self.sock = sock
        # A pipe of which the parent holds this end only: the kernel closes it if the parent dies,
        # and the worker ends.
        self._lifeline = lifeline
        self.tickets = tickets  # None where no tasks are sent ahead
        self.reader = FrameReader()
        # Guards `_unsent` and the writing to the socket. Reentrant, because a finalizer that runs
        # while this thread holds it may enqueue.
        self._lock = threading.RLock()
        self._unsent = bytearray()  # The socket has not accepted these bytes yet.
        self.is_watched_for_writing = False  # by the dispatcher

    def receive(self) -> list[WorkerMessage]:
        """Return the messages that are complete now, of one read. Raises EOFError at the end."""
        try:
            return self._read()
        except BlockingIOError:
            return []

    def stop_sending(self) -> None:
        """Have the worker read the end of its socket, after which it ends. From any thread."""
        with suppress(OSError):  # It has ended already.
            self.sock.shutdown(socket.SHUT_WR)

    def receive_rest(self) -> Iterator[WorkerMessage]:
        """Yield everything that a dead worker has sent."""
        with suppress(BlockingIOError, EOFError):
            while True:
                yield from self._read()

    def _read(self) -> list[WorkerMessage]:
        try:
            data = self.sock.recv(READ_SIZE)
        except BlockingIOError:
            raise
        except OSError:
            data = b""
        if not data:
            raise EOFError
        return [decode(body) for body in self.reader.feed(data)]

    @property
    def has_unsent(self) -> bool:
        """Whether flush() must be called when the socket accepts more."""
        return bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send data now as far as the socket accepts it; the rest is for flush()."""
        with self._lock:
            sent = 0 if self._unsent else self._send_now(data)
            if sent < len(data):
                self._unsent += memoryview(data)[sent:]

    def flush(self) -> None:
        """Send as many of the unsent bytes as the socket accepts."""
        with self._lock:
            sent = self._send_now(self._unsent)
            del self._unsent[:sent]

    def discard_unsent(self) -> None:
        """Forget the unsent bytes: the worker does not read them any longer."""
        with self._lock:
            self._unsent.clear()

    def _send_now(self, data: bytes | bytearray) -> int:
        """Return the number of bytes that need not be sent again: all, if the worker has died."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # The sentinel reports the death.
            return len(data)

    def close(self) -> None:
        """Close all descriptors."""
        self.sock.close()
        self._lifeline.close()
        if self.tickets is not None:
            self.tickets.close()
