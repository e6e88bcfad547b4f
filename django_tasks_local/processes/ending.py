"""Clean up after a task, end a worker as Python ends a process, and describe how it ended."""

from __future__ import annotations

import atexit
import logging
import signal
import sys
from contextlib import suppress
from multiprocessing import util as multiprocessing_util
from typing import TYPE_CHECKING

from .lifeline import kill_group

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

# The exit code of a worker that SIGTERM has ended, as a shell reports it: 128 plus the number.
SIGTERM_EXIT_CODE = 143
LOST_EXIT_CODE = 255  # the exit code that multiprocessing reports after its fork server has died


# A worker process calls the functions below.


def call_exit_functions() -> None:
    """
    Call the functions of atexit, and logging.shutdown(), when this worker process ends.

    The fork server has imported `logging` and then forgets its function of atexit. On Python 3.12
    a process of the fork server calls no function of atexit.
    """
    # Priorities below 0: first come the finalizers of other packages, and the end of child
    # processes, which may still write log records.
    multiprocessing_util.Finalize(None, logging.shutdown, exitpriority=-300)
    if sys.version_info < (3, 13):
        run = atexit._run_exitfuncs  # noqa: SLF001 - atexit has no public name for it
        multiprocessing_util.Finalize(None, run, exitpriority=-200)


def cancel_alarm() -> None:
    """Cancel a signal.alarm() that a task has left: SIGALRM would end a later task."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_REAL, 0)


def flush_standard_streams() -> None:
    """Write the text that a task has printed: a stream into a pipe or a file keeps up to 8 KiB."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):  # The stream is None or closed, or its reader has ended.
            stream.flush()


# The parent calls the function below.


def end_and_describe(process: BaseProcess, seconds: float) -> str:
    """
    Return a phrase with the signal or exit code of a worker that ends, and close its object.

    Kill the processes that are left in its group, and the worker if it runs for `seconds` more.
    """
    process.join(seconds)
    kill_group(process.pid)
    code = process.exitcode
    if code is None or code == LOST_EXIT_CODE:
        # The process still runs (None), or its fork server died, which hides whether it runs.
        process.kill()
    with suppress(ValueError):  # close() raises it while the process runs.
        process.close()
    if code == SIGTERM_EXIT_CODE:
        code = -signal.SIGTERM
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
