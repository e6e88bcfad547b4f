"""
Issue tickets: a worker that still runs another task may begin a task only with its ticket.

    the parent                          a worker process
    ----------                          ----------------
    issue(2) -----> [ 7 8 ] <---------- take(7): reads 7, so it begins the task with ticket 7
                    [ 8 ]
    take_back() <-- [ 8 ]               take(8): reads nothing, so it skips the task

Both sides hold the read end of one pipe. Only the side that has read a number may use its task: the
worker runs the task, or the parent gives it to another worker. Each number has one reader, because
the kernel finishes one read() of a pipe before it begins another, and removes the bytes that it
returns. Each read() returns one whole number, because issue() writes whole numbers of eight bytes,
at most MAX_ISSUED at a time, and POSIX divides no write of up to PIPE_BUF bytes (512 or more).

Windows has no tickets, so the dispatcher sends no tasks ahead there: a process cannot read a
Windows pipe's handle without waiting.
"""

from __future__ import annotations

import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import BaseContext

_NUMBER = struct.Struct("!Q")
MAX_ISSUED = 64  # numbers in one write() of issue(): 512 bytes


class Tickets:
    """Issues and takes back tickets in the parent. Only one thread at a time may use it."""

    def __init__(self, context: BaseContext) -> None:
        # Use a pipe of multiprocessing, which can pass it to a worker with any start method.
        self.pipe, self._write_end = context.Pipe(duplex=False)
        self._last = 0
        os.set_blocking(self.pipe.fileno(), False)  # This applies to the worker's copy too.
        os.set_blocking(self._write_end.fileno(), False)

    def issue(self, count: int) -> range:
        """Write `count` new ticket numbers into the pipe; return them in rising order."""
        numbers = range(self._last + 1, self._last + 1 + count)
        self._last += count
        for at in range(0, count, MAX_ISSUED):
            data = b"".join(map(_NUMBER.pack, numbers[at : at + MAX_ISSUED]))
            os.write(self._write_end.fileno(), data)
        return numbers

    def take_back(self) -> int | None:
        """Read and return the lowest number that the worker has not read, or None."""
        return _read_number(self.pipe.fileno())

    def close(self) -> None:
        """Close the parent's two ends of the pipe."""
        self.pipe.close()
        self._write_end.close()


class TicketReader:
    """Takes tickets in a worker process. Only one thread at a time may use it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._held = 0  # the last number that take() has read; its task may still arrive

    def take(self, number: int) -> bool:
        """Return whether the worker may begin the task with this ticket. Numbers must rise."""
        if self._held < number:
            # The parent has taken back all numbers between `_held` and the number read here.
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
        return None  # The parent has closed the pipe.
    number: int = _NUMBER.unpack(data)[0]
    return number
