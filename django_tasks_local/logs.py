"""
Make the loggers of this package, whose methods raise nothing.

Most log records of this package are written by the last handler of an error: in the main loop of a
worker thread, of the dispatcher or of the ticker. A filter or handler of the project that raises
would end that thread, and all waiting tasks would wait without end.
"""

from __future__ import annotations

import logging
import sys
import traceback
from contextlib import suppress
from typing import Any, override


class SafeLogger(logging.LoggerAdapter[logging.Logger]):
    """Writes log records; if a filter or handler raises, writes the text to sys.stderr instead."""

    @override
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        # All other methods call this one: debug(), info(), warning(), error() and exception().
        try:
            # Level 2 is the caller of such a method, so the record has the caller's line number.
            super().log(level, msg, *args, **{"stacklevel": 2} | kwargs)
        except BaseException:  # noqa: BLE001 - a filter that raises SystemExit must not end a thread
            _write_to_stderr(msg, args)


def get_logger(name: str) -> SafeLogger:
    """Return a SafeLogger for the logger with this name."""
    return SafeLogger(logging.getLogger(name))


def _write_to_stderr(msg: object, args: tuple[object, ...]) -> None:
    """Write a message, and the traceback of the error that prevented its log record."""
    # No place is left to report an error in one of these lines. The second line must run also if
    # the first one raises, and the traceback cannot be formatted if a user's method raises.
    with suppress(BaseException):
        sys.stderr.write(f"{str(msg) % args if args else msg}\n")
    with suppress(BaseException):
        sys.stderr.write(traceback.format_exc())
