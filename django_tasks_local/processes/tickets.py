"""
Tickets: the right to begin a task that was sent to a worker which still runs another one.

    the parent                          a worker process
    ----------                          ----------------
    issue(7, 8) --> [ 7 8 ] <---------- take(7): reads 7, so it begins the task with ticket 7
                    [ 8 ]
    take_back() <-- [ 8 ]               take(8): reads nothing, so it skips the task

Both sides hold the read end of one pipe. A task may be begun by the side that has read its number,
by no other: the worker runs it, the parent gives it to another worker. Each number has one reader,
because the kernel lets one read() of a pipe end before it begins another, and removes the bytes
that it returns. Each read() gets one whole number, because only whole
numbers of eight bytes are written, at most MAX_ISSUED at once, and POSIX guarantees that writes of
up to PIPE_BUF (512 bytes or more) are not divided.

POSIX only: on Windows a pipe's handle cannot be read without waiting, and no task is sent ahead.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

_NUMBER = struct.Struct("!Q")
MAX_ISSUED = 64  # numbers of one call of issue(): 512 bytes


class Tickets:
    """The parent's side. For one thread at a time."""

    def __init__(self, context: BaseContext) -> None:
        # multiprocessing's pipe, because it can be passed to a worker however that is started.
        self.pipe, self._write_end = context.Pipe(duplex=False)
        self._last = 0
        os.set_blocking(self.pipe.fileno(), False)  # for the worker's copy as well
        os.set_blocking(self._write_end.fileno(), False)

    def issue(self, count: int) -> range:
        """Let `count` more tasks be begun; return the numbers of their tickets, which rise."""
        numbers = range(self._last + 1, self._last + 1 + count)
        self._last += count
        for at in range(0, count, MAX_ISSUED):
            data = b"".join(map(_NUMBER.pack, numbers[at : at + MAX_ISSUED]))
            os.write(self._write_end.fileno(), data)
        return numbers

    def take_back(self) -> int | None:
        """Return the lowest number that the worker has not read; None if it has read all."""
        return _read_number(self.pipe.fileno())

    def close(self) -> None:
        """Close both ends."""
        self.pipe.close()
        self._write_end.close()


class TicketReader:
    """The worker's side. For one thread at a time."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = 0  # a number that was read for a task that is still to come

    def take(self, number: int) -> bool:
        """Return whether the task with this ticket may be begun. Call it with rising numbers."""
        if self._held < number:
            # The numbers between the held one and this one were taken back.
            read = _read_number(self._descriptor)
            if read is None:
                return False
            self._held = read
        return self._held == number


def _read_number(descriptor: int) -> int | None:
    try:
        data = os.read(descriptor, _NUMBER.size)
    except BlockingIOError:
        return None
    if not data:
        return None  # The other side has closed the pipe.
    number: int = _NUMBER.unpack(data)[0]
    return number
