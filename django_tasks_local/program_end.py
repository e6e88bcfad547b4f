"""
This module knows whether the main program has failed, or has ended as it should.

Python keeps the exception that has ended the program in `sys.last_exc`, but no exit code: this
module replaces sys.exit(), and so does not know the code of a `raise SystemExit(code)`.
"""

from __future__ import annotations

import sys
import threading
from typing import NoReturn

_sys_exit = sys.exit


class _State:
    """Holds the argument of the last call of sys.exit() in the main thread."""

    exit_code: object = None


def watch_exit_code() -> None:
    """Replace sys.exit() by a function that remembers its argument."""
    sys.exit = _exit


def _exit(status: object = None, /) -> NoReturn:
    if threading.current_thread() is threading.main_thread():
        _State.exit_code = status
    _sys_exit(status)  # type: ignore[arg-type]


def has_failed() -> bool:
    """Return whether an exception, or an exit code other than 0, has ended the main program."""
    # multiprocessing calls its finalizers while it handles an exception of the child's function.
    error = sys.exception()
    if isinstance(error, SystemExit):
        return error.code not in (None, 0)
    return error is not None or _uncaught() is not None or _State.exit_code not in (None, 0)


def is_interrupted() -> bool:
    """Return whether Ctrl-C has ended the main program with a KeyboardInterrupt."""
    return isinstance(_uncaught(), KeyboardInterrupt)


def _uncaught() -> BaseException | None:
    """Return the exception that has ended the main program, or None."""
    error: BaseException | None = getattr(sys, "last_exc", None)
    if error is None or hasattr(sys, "ps1"):
        return None  # `ps1` exists in an interactive interpreter, which continues after errors.
    # The shell of `manage.py shell` continues too. Its tracebacks begin with the code that was
    # typed, which the shell's own functions have called.
    frames = error.__traceback__
    return None if frames is not None and frames.tb_frame.f_back is not None else error
