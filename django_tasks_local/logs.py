"""
Make the loggers of this package, whose methods raise nothing.

Most log records of this package are written by the last handler of an error: in the main loop of a
worker thread, of the dispatcher or of the ticker. A filter or handler of the project that raises
would end that thread, and all waiting tasks would wait without end.
"""

from __future__ import annotations

import logging
import sys
import threading
import traceback
from contextlib import suppress
from typing import TYPE_CHECKING, Any, override

if TYPE_CHECKING:
    from collections.abc import Callable


class _Thread(threading.local):
    """Holds state that each thread has for itself."""

    # Makes a call in another thread, which may wait for a log handler.
    post: Callable[..., object] | None = None


_thread = _Thread()


def write_in_other_thread(post: Callable[..., object]) -> None:
    """Have `post(function, *args)` write the later log records of the calling thread."""
    _thread.post = post


class SafeLogger(logging.LoggerAdapter[logging.Logger]):
    """Writes log records; if a filter or handler raises, writes the text to sys.stderr instead."""

    @override
    def log(self, level: int, msg: object, *args: object, **kwargs: Any) -> None:
        # All other methods call this one: debug(), info(), warning(), error() and exception().
        try:
            if _thread.post is not None:
                self._post(_thread.post, level, msg, args, **kwargs)
                return
            # Level 2 is the caller of such a method, so the record has the caller's line number.
            super().log(level, msg, *args, **{"stacklevel": 2} | kwargs)
        except BaseException:  # noqa: BLE001 - a filter that raises SystemExit must not end a thread
            _write_to_stderr(msg, args)

    def _post(
        self,
        post: Callable[..., object],
        level: int,
        msg: object,
        args: tuple[object, ...],
        exc_info: bool = False,
    ) -> None:
        """Make the log record here, and have another thread give it to the handlers."""
        if self.isEnabledFor(level):
            # Level 3 is the caller of a method such as info(), which calls log().
            file, line, function, _ = self.logger.findCaller(stacklevel=3)
            error = sys.exc_info() if exc_info else None
            name = self.logger.name
            post(
                self._handle,
                self.logger.makeRecord(name, level, file, line, msg, args, error, function),
                args,
            )

    def _handle(self, record: logging.LogRecord, args: tuple[object, ...]) -> None:
        try:
            self.logger.handle(record)
        except BaseException:  # noqa: BLE001 - a filter that raises SystemExit must not end a thread
            _write_to_stderr(record.msg, args)


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
