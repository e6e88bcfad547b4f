"""
Receive the frames of the parent in a worker process.

Where a process can handle SIGTERM, the main thread of a worker receives a frame when it needs the
next task. On Windows, a thread receives all frames, so that the frame CANCEL arrives while the main
thread runs a task.
"""

from __future__ import annotations

from queue import SimpleQueue
from typing import TYPE_CHECKING

from ..new_thread import new_thread
from .frames import READ_SIZE, FrameReader

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable


class Receiver:
    """Receives frames in the thread that calls receive()."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = FrameReader()

    def receive(self) -> list[memoryview] | None:
        """
        Wait for bytes; return the bodies of the frames that are complete now.

        Returns None when the parent has closed its side of the socket.
        """
        data = self._sock.recv(READ_SIZE)
        return self._reader.feed(data) if data else None


class ReceiverThread(Receiver):
    """Receives frames in a thread, which calls `cancel` when it receives the frame CANCEL."""

    def __init__(self, sock: socket.socket, cancel: Callable[[], object]) -> None:
        super().__init__(sock)
        self._cancel = cancel
        self._received: SimpleQueue[list[memoryview] | None] = SimpleQueue()
        new_thread("django-tasks-receiver", self._run).start()

    def receive(self) -> list[memoryview] | None:
        """Wait for frames of tasks; return their bodies, or None at the end of the socket."""
        return self._received.get()

    def _run(self) -> None:
        bodies: list[memoryview] | None = []
        while bodies is not None:
            try:
                bodies = super().receive()
            except OSError:  # Windows reports the death of the parent as an error.
                bodies = None
            if bodies is not None and not all(bodies):  # The body of CANCEL is empty.
                self._cancel()
                bodies = [body for body in bodies if body]
            self._received.put(bodies)
