"""End a worker process when its parent ends."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from ..new_thread import new_thread

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


def die_with_parent(lifeline: Connection) -> None:
    """
    End this process when the parent ends: the kernel then closes the other end of the pipe.

    On Linux the kernel sends SIGKILL to this process. On other systems a thread waits for the end
    of the pipe, and while a task runs C code this thread may have to wait for the GIL.
    """
    if sys.platform != "linux":
        new_thread("django-tasks-parent", _exit_at_end, lifeline).start()
        return
    import fcntl

    os.set_inheritable(lifeline.fileno(), False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():  # The parent ended before F_SETFL, so no signal comes.
        os._exit(1)


def _exit_at_end(lifeline: Connection) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)
