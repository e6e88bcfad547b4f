"""Send tasks to a worker and receive its messages, in the parent and without blocking."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from .frames import READ_SIZE, FrameReader
from .wire import decode

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.connection import Connection

    from .tickets import Tickets
    from .wire import WorkerMessage


def socketpair() -> tuple[socket.socket, socket.socket]:
    """
    Return two connected sockets that send each small message without delay.

    On Windows they use TCP, which would hold a message back, for up to 0.2 seconds, until the
    receiver has acknowledged the message before it.
    """
    pair = socket.socketpair()
    for sock in pair:
        if sock.family is socket.AF_INET:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return pair


class WorkerConnection:
    """
    Holds the parent's ends of one worker's socket and pipes.

    Any thread may send; only the dispatcher's thread receives.
    """

    def __init__(
        self, sock: socket.socket, lifeline: Connection, tickets: Tickets | None = None
    ) -> None:
        self.sock = sock
        # Only the parent holds this end of a pipe. If the parent dies, the kernel closes the end,
        # and the worker, which watches the other end, dies too.
        self._lifeline = lifeline
        self.tickets = tickets  # None on Windows, where no task is sent ahead.
        self.reader = FrameReader()
        # Guards: `_unsent` and the order of writes to the socket. Reentrant, because a finalizer
        # that runs while this thread holds it may enqueue a task.
        self._lock = threading.RLock()
        self._unsent = bytearray()  # The socket has not accepted these bytes yet.
        # Whether the dispatcher calls flush() when the socket accepts more bytes.
        self.is_watched_for_writing = False

    def receive(self) -> list[WorkerMessage]:
        """Read once; return the complete messages. Raises EOFError at the end of the socket."""
        try:
            return self._read()
        except BlockingIOError:
            return []

    def stop_sending(self) -> None:
        """Have the worker read the end of its socket, after which it ends. From any thread."""
        with suppress(OSError):  # The worker has ended already.
            self.sock.shutdown(socket.SHUT_WR)

    def receive_rest(self) -> Iterator[WorkerMessage]:
        """Yield all complete messages that the worker has sent and the parent has not read."""
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
        """Return whether the dispatcher must call flush() when the socket accepts more bytes."""
        return bool(self._unsent)

    def send(self, data: bytes) -> None:
        """Send the bytes that the socket accepts now; keep the others for flush()."""
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
        """Discard the unsent bytes, because the worker no longer reads its socket."""
        with self._lock:
            self._unsent.clear()

    def _send_now(self, data: bytes | bytearray) -> int:
        """Send data; return how many bytes need no further send: all, if the worker has died."""
        try:
            return self.sock.send(data)
        except BlockingIOError:
            return 0
        except OSError:  # The dispatcher handles the worker's death.
            return len(data)

    def close(self) -> None:
        """Close the parent's ends of the socket and of the pipes."""
        self.sock.close()
        self._lifeline.close()
        if self.tickets is not None:
            self.tickets.close()
