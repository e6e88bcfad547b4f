"""
Remove the directory of the fork server when the fork server ends: only it imports this module.

multiprocessing creates the directory for a socket and removes it in atexit. A server that ends by
raising SIGTERM again, as uvicorn does, calls no function of atexit and would leave the directory.
The fork server ends when the last process that uses it has ended.
"""

from __future__ import annotations

import atexit
import os
from contextlib import suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any


def remove_directory(pid: int) -> None:
    """Remove the socket of the fork server with this pid, and its directory if this is empty."""
    server: Any = forkserver._forkserver  # noqa: SLF001 - it has no public name
    address = server._forkserver_address  # noqa: SLF001 - the path of the socket
    # A child of the fork server has copies of its functions of atexit, but not on 3.13 and later.
    if address and os.getpid() == pid:
        with suppress(OSError):  # The parent may have removed them.
            Path(address).unlink(missing_ok=True)
            Path(address).parent.rmdir()


atexit.register(remove_directory, os.getpid())
