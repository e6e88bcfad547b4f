"""The end of a worker process together with its parent."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.connection import Connection


def die_with_parent(lifeline: Connection) -> None:
    """
    End this process when the parent ends: only the parent holds the other end of this pipe.

    On Linux the kernel sends SIGKILL: a thread would wait for the GIL while a task is in C code.
    """
    if sys.platform != "linux":
        threading.Thread(
            target=_exit_at_end, args=(lifeline,), name="django-tasks-parent", daemon=True
        ).start()
        return
    import fcntl

    os.set_inheritable(lifeline.fileno(), False)
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():  # The parent has ended before the lines above.
        os._exit(1)


def _exit_at_end(lifeline: Connection) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    os._exit(1)
