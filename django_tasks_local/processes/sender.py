"""Send frames from a worker process to its parent."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import socket


class Sender:
    """Sends whole frames. Called from: any thread, also in a finalizer or a signal handler."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        # Guards: `_frames` and the socket, so that no thread writes into another thread's frame.
        # Reentrant, because a finalizer that runs while this thread holds it may report progress.
        self._lock = threading.RLock()
        self._is_sending = False
        self._frames: deque[bytes] = deque()

    def send(self, data: bytes) -> None:
        """Send one or several frames; a call that interrupts send() leaves them to that send()."""
        with self._lock:
            self._frames.append(data)
            if self._is_sending:
                return
            self._is_sending = True
            try:
                while self._frames:
                    self._sock.sendall(self._frames.popleft())
            finally:
                self._is_sending = False
