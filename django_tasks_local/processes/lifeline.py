"""End a worker process, and the programs that its tasks have started, when its parent ends."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from ..forking import reset_in_child
from ..new_thread import new_thread
from . import facilities

if TYPE_CHECKING:
    import socket
    from multiprocessing.connection import Connection

OPEN_FILES = Path("/dev/fd")  # Linux and macOS list the descriptors of the calling process here.


def lead_group() -> None:
    """
    Move this worker process into a process group of its own, which ends with the worker.

    The programs that its tasks start belong to this group, unless they leave it.
    """
    if sys.platform != "win32" and facilities.HAS_GROUPS:
        os.setpgid(0, 0)


def kill_group(worker_pid: int | None) -> None:
    """
    Kill all processes in the group of a worker, also after the worker itself has ended.

    While a process of the group is left, the kernel gives the number of the group to no other one.
    """
    if sys.platform != "win32" and facilities.HAS_GROUPS and worker_pid is not None:
        # Nothing is left of the group, or the worker ended before it led one.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(worker_pid, signal.SIGKILL)


def keep_descriptors(sock: socket.socket) -> None:
    """
    Let the programs and processes that tasks start inherit no descriptor that ends this worker.

    A program that outlives the worker would keep the socket open, and the pipes of multiprocessing
    with which the parent notices the worker's death. multiprocessing passes them inheritable.
    """
    sock.set_inheritable(False)
    if OPEN_FILES.exists():
        for number in [int(file.name) for file in OPEN_FILES.iterdir()]:
            if number > 2:  # the standard streams
                with suppress(OSError):  # iterdir() itself had opened the descriptor.
                    os.set_inheritable(number, False)
    # A child of fork() has a copy of the socket, and the parent reads its end after the last copy.
    reset_in_child(sock.close)


def die_with_parent(lifeline: Connection) -> None:
    """
    End this process and its group when the parent ends: the kernel then closes the other end.

    On Linux the kernel sends SIGKILL to the group. On other systems, and where a sandbox refuses
    F_SETSIG, a thread waits for the end of the pipe, and while a task runs C code this thread may
    have to wait for the GIL.
    """
    try:
        _request_sigkill(lifeline)
    except OSError:
        new_thread("django-tasks-parent", _exit_at_end, lifeline).start()


def _request_sigkill(lifeline: Connection) -> None:
    """Have the kernel send SIGKILL when the parent ends. Raises OSError if it cannot."""
    if sys.platform != "linux":
        raise OSError("Only Linux has F_SETSIG.")
    import fcntl

    fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())  # below 0: all processes of the group
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if lifeline.poll():  # The parent ended before F_SETFL, so no signal comes.
        os._exit(1)


def _exit_at_end(lifeline: Connection) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv_bytes()
    kill_group(os.getpid())
    os._exit(1)  # on Windows
