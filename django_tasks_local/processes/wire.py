"""
The protocol between a pool and its worker processes: both ends of it.

    the parent                            a worker process
    ----------                            ----------------
                <------- Ready ---------  Django is set up (Broken: it could not be)
                -------- RunTask ------>
                <------- Started -------  the worker owns the task
                <------- Sample --------  its progress, any number of times
                <------- Result --------  how it ended

A frame is a header and a pickled tuple of plain values, so that neither side needs a class of the
other one's application, exceptions included. Arguments and return values are pickled separately,
inside the tuple: one that cannot be loaded fails its own task and nothing else. If a process dies,
at most one frame stays unfinished.
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

if TYPE_CHECKING:
    from ..aliases import AnyTask

    type TaskOptions = tuple[int, str, str, datetime | None, bool]

HEADER = struct.Struct("!Q")  # the length of the body in bytes
_TASK_HEADER = struct.Struct("!QQ")  # the same, and the first part of the body: the ticket, or 0
_TICKET = struct.Struct("!Q")
READ_SIZE = 1 << 16  # bytes of one recv(): a fast worker must not keep the dispatcher from others

_unpack_header = HEADER.unpack_from
_pack_header = HEADER.pack
_PROGRESS_FIELDS = tuple(field.name for field in fields(Progress))
_progress_values = attrgetter(*_PROGRESS_FIELDS)


class RemoteTraceback(Exception):  # noqa: N818 - it is the cause of a RemoteError
    """The text of a traceback in a worker process."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class RemoteError(Exception):
    """The exception that a task raised in a worker process; the traceback there is its cause."""


# Frames


def frame(body: bytes) -> bytes:
    """Return a body with its header."""
    return _pack_header(len(body)) + body


class FrameReader:
    """Cuts the bytes of a socket into the bodies of frames."""

    def __init__(self) -> None:
        self._partial = bytearray()  # the beginning of a frame that is not complete
        self._wanted = HEADER.size  # bytes that `_partial` needs before it is worth parsing

    @property
    def incomplete(self) -> int:
        """The number of bytes that were read of a frame that is not complete."""
        return len(self._partial)

    def feed(self, data: bytes) -> list[memoryview]:
        """Add bytes that were read; return the bodies of all frames that are complete now."""
        stream: bytes | bytearray = data
        if self._partial:
            self._partial += data
            if len(self._partial) < self._wanted:
                # A long frame is parsed once, not again for each of its thousand pieces.
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


# Messages of the parent


class RunTask(NamedTuple):
    """
    A task to run.

    The time is a text: pickle needs 9 µs for a dataclass with a datetime, and 1 µs for this.
    """

    result_id: str
    path: str
    options: TaskOptions
    arguments: bytes  # pickled (args, kwargs)
    enqueued_at: str

    def load_arguments(self) -> tuple[list[Any], dict[str, Any]]:
        """Return args and kwargs. Raises whatever pickle raises."""
        args, kwargs = pickle.loads(self.arguments)  # noqa: S301 - from our own parent
        return args, kwargs


def encode_task(
    result_id: str, task: AnyTask, args: list[Any], kwargs: dict[str, Any], enqueued_at: datetime
) -> bytes:
    """Return a RunTask, for frame_task(). Raises whatever pickle raises for the arguments."""
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
    """Return the frame of an encoded RunTask. 0: the worker need not take a ticket to begin it."""
    return _TASK_HEADER.pack(_TICKET.size + len(message), ticket) + message


def ticket_of(body: memoryview) -> int:
    """Return the number of the ticket of a frame from the parent."""
    ticket: int = _TICKET.unpack_from(body)[0]
    return ticket


def decode_task(body: memoryview) -> RunTask:
    """Return the message of a frame from the parent."""
    return RunTask._make(pickle.loads(body[_TICKET.size :]))  # noqa: S301 - from our own parent


def task_options(task: AnyTask) -> TaskOptions:
    """Return the fields of a task that `Task.using()` may have changed, and `takes_context`."""
    return (task.priority, task.backend, task.queue_name, task.run_after, task.takes_context)


# Messages of a worker


class Ready(NamedTuple):
    """Django is set up, and the worker waits for tasks."""


class Broken(NamedTuple):
    """Django cannot be set up."""

    error: str  # a traceback


class Started(NamedTuple):
    """The task begins: it must not be given to another worker after this message."""

    result_id: str
    started_at: float  # the worker's time.time()


class Sample(NamedTuple):
    """A later state of the task's progress."""

    result_id: str
    number: int
    values: tuple[Any, ...]  # of a Progress

    @property
    def progress(self) -> Progress:
        """The sample as the parent publishes it."""
        return _progress(self.values)


class Result(NamedTuple):
    """How the task ended."""

    result_id: str
    seconds: float  # how long the task's function ran
    return_value: bytes  # pickled; empty for None, which most tasks return
    error: tuple[str, str] | None  # the exception's dotted path, and its traceback
    message: str | None  # the exception's text
    number: int  # of the last sample
    values: tuple[Any, ...] | None  # of the last Progress; None if the task reported nothing

    @property
    def last(self) -> tuple[int, Progress | None]:
        """The number of the last sample, and the final progress."""
        return self.number, None if self.values is None else _progress(self.values)

    def outcome(self) -> Outcome:
        """Return the outcome. A return value that cannot be loaded here is a failure."""
        if self.error is not None:
            path, traceback = self.error
            # Django's log record shows it. As in concurrent.futures, the cause has the traceback.
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
            return Outcome(return_value=pickle.loads(self.return_value))  # noqa: S301 - our child's
        except Exception as error:  # noqa: BLE001 - its class may be unknown in this process
            return Outcome.failure(error)


class Unreadable(NamedTuple):
    """Stands for a frame that is none of the messages above: never sent, made by decode()."""

    error: Exception


type WorkerMessage = Ready | Broken | Started | Sample | Result | Unreadable

# A message is sent as (its index in this tuple, *its fields).
_KINDS: tuple[type[Ready | Broken | Started | Sample | Result], ...]
_KINDS = (Ready, Broken, Started, Sample, Result)
_INDEXES = {kind: index for index, kind in enumerate(_KINDS)}


def encode(message: Ready | Broken | Started | Sample | Result) -> bytes:
    """Return the frame of a worker's message."""
    values: tuple[Any, ...] = (_INDEXES[type(message)], *message)
    return frame(pickle.dumps(values, pickle.HIGHEST_PROTOCOL))


def decode(body: memoryview) -> WorkerMessage:
    """Return the message of a frame from a worker; Unreadable if it is none."""
    try:
        index, *values = pickle.loads(body)  # noqa: S301 - from our own worker
        message: WorkerMessage = _KINDS[index](*values)
    except Exception as error:  # noqa: BLE001 - pickle raises whatever the bytes lead to
        return Unreadable(error)
    return message


def encode_sample(result_id: str, number: int, progress: Progress) -> bytes:
    """Return the frame of a Sample."""
    return encode(Sample(result_id, number, _progress_values(progress)))


def encode_result(
    result_id: str, seconds: float, outcome: Outcome, last: tuple[int, Progress | None]
) -> bytes:
    """Return the frame of a Result. A return value that cannot be pickled is a failure."""
    return_value = b""
    if outcome.return_value is not None:
        try:
            return_value = pickle.dumps(outcome.return_value, pickle.HIGHEST_PROTOCOL)
        except Exception as exception:  # noqa: BLE001 - raised by the value's own methods
            outcome = Outcome.failure(exception)
    error = None
    if outcome.error is not None:
        error = outcome.error.exception_class_path, outcome.error.traceback
    number, progress = last
    values = None if progress is None else _progress_values(progress)
    message = outcome.message
    return encode(Result(result_id, seconds, return_value, error, message, number, values))


def to_datetime(timestamp: float) -> datetime:
    """Return a worker's time as Django has it: aware if USE_TZ is True, else naive."""
    return datetime.fromtimestamp(timestamp, UTC if settings.USE_TZ else None)


def _progress(values: tuple[Any, ...]) -> Progress:
    return Progress(**dict(zip(_PROGRESS_FIELDS, values, strict=True)))
