"""
Lift two limits of multiprocessing: children of daemonic processes, and the Python interpreter.

This module uses private names of multiprocessing, which has no public ones for them.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import sysconfig
import threading
from contextlib import contextmanager
from multiprocessing import spawn
from pathlib import Path
from typing import TYPE_CHECKING, Any

from django.core.exceptions import ImproperlyConfigured

if TYPE_CHECKING:
    from collections.abc import Iterator

NO_INTERPRETER = (
    "multiprocessing would start {program!r} as the Python interpreter of worker processes, and no "
    "other interpreter was found in {folders}. Call multiprocessing.set_executable() with the path "
    "of a Python {version} interpreter in the settings module."
)

# Guards: the flag "daemon" of this process, which two dispatchers may change concurrently.
_daemon_lock = threading.Lock()


@contextmanager
def children_allowed() -> Iterator[None]:
    """
    Let this process start a worker although it may be daemonic itself.

    Some servers, such as hypercorn, serve in daemonic processes. multiprocessing refuses to start
    children of these, because it kills daemonic processes at its exit, and their children would
    stay. A worker does not stay: it ends when its parent ends.
    """
    process: Any = multiprocessing.current_process()
    config = process._config  # noqa: SLF001 - the public attribute cannot be set in a running process
    with _daemon_lock:
        is_daemonic = config.get("daemon", False)
        if is_daemonic:
            config["daemon"] = False
        try:
            yield
        finally:
            if is_daemonic:
                config["daemon"] = True


def ensure_interpreter() -> None:
    """
    Make multiprocessing start a Python interpreter where `sys.executable` is another program.

    In an embedded interpreter it is that of the server, such as uWSGI. An executable that the
    project has set with multiprocessing.set_executable() is kept. Raises
    ImproperlyConfigured if no interpreter is found.
    """
    chosen = os.fsdecode(spawn.get_executable() or "")
    if chosen != (sys.executable or "") or getattr(sys, "frozen", False):
        return
    if chosen and "uwsgi" not in sys.modules and Path(chosen).name != "uwsgi":
        return
    folders = dict.fromkeys(
        Path(prefix, "Scripts" if sys.platform == "win32" else "bin")
        for prefix in (sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix)
    )
    version = sysconfig.get_python_version()
    # A name without a version may be an interpreter of another version.
    names = [f"python{version}{getattr(sys, 'abiflags', '')}", f"python{version}"]
    for path in (folder / name for folder in folders for name in names):
        if path.is_file() and os.access(path, os.X_OK):
            multiprocessing.set_executable(str(path))
            return
    raise ImproperlyConfigured(
        NO_INTERPRETER.format(program=chosen, folders=", ".join(map(str, folders)), version=version)
    )
