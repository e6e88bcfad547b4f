"""
Encode and decode the messages between a process pool and its worker processes.

    the parent                            a worker process
    ----------                            ----------------
                <------- Ready ---------  has set up Django (sends Broken if it cannot)
                -------- RunTask ------>
                <------- Started -------  owns the task
                <------- Sample --------  reports progress, any number of times
                <------- Result --------  sends the outcome
                -------- CANCEL ------->  cancels its task; only where SIGTERM cannot be handled

A frame is a header and a pickled tuple of plain values, so neither side must import a class of the
application, such as an exception, to read a frame. Arguments and return values are pickled
separately, inside the tuple: one that cannot be loaded fails its own task and no other. If a
process dies, it leaves at most one frame unfinished.
"""

from __future__ import annotations

import pickle
import struct
from dataclasses import fields
from datetime import UTC, datetime
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from django.conf import settings
from django.tasks.base import TaskError

from ..events import Progress
from ..execution import Outcome
from .loading import task_options

if TYPE_CHECKING:
    from ..aliases import AnyTask
    from .loading import TaskOptions

HEADER = struct.Struct("!Q")  # the length of the body in bytes
_TASK_HEADER = struct.Struct("!QQ")  # HEADER, then the ticket, with which the body begins
_TICKET = struct.Struct("!Q")
READ_SIZE = 1 << 16  # bytes of one recv(), so that a fast worker does not delay the other workers

_unpack_header = HEADER.unpack_from
_pack_header = HEADER.pack
_PROGRESS_FIELDS = tuple(field.name for field in fields(Progress))
_progress_values = attrgetter(*_PROGRESS_FIELDS)


class RemoteTraceback(Exception):  # noqa: N818 - the name says what it holds
    """Shows the text of a worker's traceback, as the `__cause__` of a RemoteError."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class RemoteError(Exception):
    """
    Stands for the exception that a task raised in a worker process.

    The worker sends no exception object, only the class path, message and traceback of the task's
    exception. The path and message are the text of a RemoteError; its `__cause__` is a
    RemoteTraceback with the traceback.
    """


# Functions and a class that make and split frames


def frame(body: bytes) -> bytes:
    """Return the frame of a body: a header with its length, and the body."""
    return _pack_header(len(body)) + body


CANCEL = frame(b"")  # asks a worker to cancel its task and to end


class FrameReader:
    """Splits the bytes that a socket receives into the bodies of frames."""

    def __init__(self) -> None:
        self._partial = bytearray()  # the beginning of a frame that is not complete
        self._wanted = HEADER.size  # the length of `_partial` at which feed() parses it

    @property
    def incomplete(self) -> int:
        """Return the number of bytes received of a frame that is not complete."""
        return len(self._partial)

    def feed(self, data: bytes) -> list[memoryview]:
        """Add received bytes; return the bodies of all frames that are complete now."""
        stream: bytes | bytearray = data
        if self._partial:
            self._partial += data
            if len(self._partial) < self._wanted:
                # Parse a long frame once, and not again for each of its thousand pieces.
                return []
            stream, self._partial = self._partial, bytearray()
        view = memoryview(stream)
        bodies = []
        start, size = 0, len(view)
        self._wanted = HEADER.size
        while size - start >= HEADER.size:
            end = start + HEADER.size + _unpack_header(view, start)[0]
            if size < end:
                self._wanted = end - start
                break
            bodies.append(view[start + HEADER.size : end])
            start = end
        if start < size:
            self._partial += view[start:]
        return bodies


# Messages that the parent sends


class RunTask(NamedTuple):
    """
    Asks a worker to run a task.

    `enqueued_at` is a text, because pickle needs 9 µs for a dataclass with a datetime, and 1 µs for
    a tuple with a text.
    """

    result_id: str
    path: str
    options: TaskOptions
    arguments: bytes  # pickled (args, kwargs)
    enqueued_at: str

    def load_arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Unpickle and return args and kwargs. Raises any exception that unpickling raises."""
        args, kwargs = pickle.loads(self.arguments)  # noqa: S301 - the parent has pickled it
        return args, kwargs


def encode_task(
    result_id: str, task: AnyTask, args: list[Any], kwargs: dict[str, Any], enqueued_at: datetime
) -> bytes:
    """Return a pickled RunTask for frame_task(). Raises any exception of pickling `args`."""
    arguments = pickle.dumps((args, kwargs), pickle.HIGHEST_PROTOCOL)
    message = (
        result_id,
        task.module_path,
        task_options(task),
        arguments,
        enqueued_at.isoformat(),
    )
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def frame_task(message: bytes, ticket: int = 0) -> bytes:
    """Return the frame of a pickled RunTask. With ticket 0 the worker needs no ticket to begin."""
    return _TASK_HEADER.pack(_TICKET.size + len(message), ticket) + message


def ticket_of(body: memoryview) -> int:
    """Return the ticket of a RunTask's frame body; 0 if the task needs no ticket."""
    ticket: int = _TICKET.unpack_from(body)[0]
    return ticket


def decode_task(body: memoryview) -> RunTask:
    """Return the RunTask in the body of a frame from the parent."""
    return RunTask._make(pickle.loads(body[_TICKET.size :]))  # noqa: S301 - the parent sent it


# Messages that a worker sends


class Ready(NamedTuple):
    """Reports that the worker has set up Django and waits for tasks."""


class Broken(NamedTuple):
    """Reports that the worker cannot set up Django and ends."""

    error: str  # a traceback


class Started(NamedTuple):
    """Reports that the worker begins the task, so the parent must give it to no other worker."""

    result_id: str
    started_at: float  # the worker's time.time()


class Sample(NamedTuple):
    """Reports the progress of the running task; a higher `number` is newer."""

    result_id: str
    number: int
    values: tuple[Any, ...]  # the values of a Progress, in the order of its fields

    @property
    def progress(self) -> Progress:
        """Return the Progress with the values of this sample."""
        return _progress(self.values)


class Result(NamedTuple):
    """Reports how the task ended."""

    result_id: str
    seconds: float  # how long the task's function ran
    return_value: bytes  # pickled; empty for None, which most tasks return
    error: tuple[str, str] | None  # the exception's dotted path, and its traceback
    message: str | None  # the exception's text
    number: int  # the number of the last Sample; 0 without one
    values: tuple[Any, ...] | None  # the final Progress; None if there is none

    @property
    def last(self) -> tuple[int, Progress | None]:
        """Return the number of the last Sample, and the final Progress, if any."""
        return self.number, None if self.values is None else _progress(self.values)

    def outcome(self) -> Outcome:
        """Return the task's Outcome; a failure if this process cannot unpickle the return value."""
        if self.error is not None:
            path, traceback = self.error
            # Django logs this exception. Its cause has the traceback, as in concurrent.futures.
            exception = RemoteError(f"{path}: {self.message}")
            exception.__cause__ = RemoteTraceback(traceback)
            return Outcome(
                error=TaskError(exception_class_path=path, traceback=traceback),
                message=self.message,
                exception=exception,
            )
        if not self.return_value:
            return Outcome()
        try:
            return Outcome(return_value=pickle.loads(self.return_value))  # noqa: S301 - from worker
        except Exception as error:  # noqa: BLE001 - the import of its class may fail here
            return Outcome.failure(error)


class Unreadable(NamedTuple):
    """Stands for a frame that decode() cannot read; no worker sends this message."""

    error: Exception


type WorkerMessage = Ready | Broken | Started | Sample | Result | Unreadable

# encode() sends a message as a tuple: the index of its class in _KINDS, then its fields.
_KINDS: tuple[type[Ready | Broken | Started | Sample | Result], ...]
_KINDS = (Ready, Broken, Started, Sample, Result)
_INDEXES = {kind: index for index, kind in enumerate(_KINDS)}


def encode(message: Ready | Broken | Started | Sample | Result) -> bytes:
    """Return the frame of a worker's message."""
    values: tuple[Any, ...] = (_INDEXES[type(message)], *message)
    return frame(pickle.dumps(values, pickle.HIGHEST_PROTOCOL))


def decode(body: memoryview) -> WorkerMessage:
    """Return the message in the body of a worker's frame; Unreadable if the body has none."""
    try:
        index, *values = pickle.loads(body)  # noqa: S301 - a worker has pickled it
        message: WorkerMessage = _KINDS[index](*values)
    except Exception as error:  # noqa: BLE001 - pickle may raise anything for wrong bytes
        return Unreadable(error)
    return message


def encode_sample(result_id: str, number: int, progress: Progress) -> bytes:
    """Return the frame of a Sample with this Progress."""
    return encode(Sample(result_id, number, _progress_values(progress)))


def encode_result(
    result_id: str, seconds: float, outcome: Outcome, last: tuple[int, Progress | None]
) -> bytes:
    """Return the frame of a Result; of a failure if the return value cannot be pickled."""
    return_value = b""
    if outcome.return_value is not None:
        try:
            return_value = pickle.dumps(outcome.return_value, pickle.HIGHEST_PROTOCOL)
        except Exception as exception:  # noqa: BLE001 - the value's methods may raise anything
            outcome = Outcome.failure(exception)
    error = None
    if outcome.error is not None:
        error = outcome.error.exception_class_path, outcome.error.traceback
    number, progress = last
    values = None if progress is None else _progress_values(progress)
    message = outcome.message
    return encode(Result(result_id, seconds, return_value, error, message, number, values))


def to_datetime(timestamp: float) -> datetime:
    """Return a timestamp as datetime: aware, in UTC, if USE_TZ is True, else naive local time."""
    return datetime.fromtimestamp(timestamp, UTC if settings.USE_TZ else None)


def _progress(values: tuple[Any, ...]) -> Progress:
    return Progress(**dict(zip(_PROGRESS_FIELDS, values, strict=True)))
