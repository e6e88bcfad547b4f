"""Facilities of the operating system that some tests need; without one, a test is skipped."""

import os
import signal
import sys
from pathlib import Path

import pytest

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork()")
needs_groups = pytest.mark.skipif(
    not (hasattr(os, "killpg") and Path("/proc/self/stat").exists()),
    reason="this system has no process groups, or no /proc to list their processes",
)
needs_open_files = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="this system has no /proc to list open files"
)
needs_stop_signal = pytest.mark.skipif(
    not hasattr(signal, "SIGSTOP"), reason="this system has no SIGSTOP"
)
needs_tickets = pytest.mark.skipif(
    sys.platform == "win32", reason="no task is sent ahead on Windows, which has no tickets"
)


def kill(pid: int) -> None:
    """End a process at once, as the kernel does when it is out of memory."""
    os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))  # On Windows each number does this.


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a zombie does not."""
    if sys.platform == "win32":
        import _winapi

        try:
            handle = _winapi.OpenProcess(0x1000, False, pid)  # PROCESS_QUERY_LIMITED_INFORMATION
        except OSError:
            return False
        try:
            return _winapi.GetExitCodeProcess(handle) == _winapi.STILL_ACTIVE
        finally:
            _winapi.CloseHandle(handle)
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False
