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

A frame is a header and a body of plain values. Neither side must import a class of the application,
such as an exception, to read a frame, and the parent refuses every other value: a frame of a worker
whose memory was corrupted executes nothing in the web process and ends only this worker. The
options of a task may have values of any class. They are pickled separately, inside the body of
RunTask: if a worker cannot load them, only this task fails. If a process dies, it leaves at most
one frame unfinished.
"""

from __future__ import annotations

import io
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
from .frames import MAX_BODY, frame
from .loading import task_options
from .remote_errors import describe, rebuild

if TYPE_CHECKING:
    from ..aliases import AnyTask
    from ..context import Carried, PlainCarried
    from .loading import TaskOptions
    from .remote_errors import Description

_TASK_HEADER = struct.Struct("!QQ")  # a frame's header, and the ticket of its body
_TICKET = struct.Struct("!Q")
_PROGRESS_FIELDS = tuple(field.name for field in fields(Progress))
_progress_values = attrgetter(*_PROGRESS_FIELDS)


# Messages that the parent sends


class RunTask(NamedTuple):
    """
    Asks a worker to run a task.

    `enqueued_at` is a text, because pickle needs 9 µs for a dataclass with a datetime, and 1 µs for
    a tuple with a text.
    """

    result_id: str
    path: str
    pickled: bytes  # (options, args, kwargs)
    enqueued_at: str
    carried: PlainCarried | None

    def load(self) -> tuple[TaskOptions, list[Any], dict[str, Any]]:
        """Return options, args and kwargs. Raises any exception that unpickling raises."""
        options, args, kwargs = pickle.loads(self.pickled)  # noqa: S301 - the parent has pickled it
        return options, args, kwargs


def encode_task(
    result_id: str,
    task: AnyTask,
    args: list[Any],
    kwargs: dict[str, Any],
    enqueued_at: datetime,
    carried: Carried | None = None,
) -> bytes:
    """
    Return a pickled RunTask for frame_task().

    Raises any exception that pickling the task's options raises, and ValueError for arguments that
    are too long for a frame.
    """
    pickled = pickle.dumps((task_options(task), args, kwargs), pickle.HIGHEST_PROTOCOL)
    message = (
        result_id,
        task.module_path,
        pickled,
        enqueued_at.isoformat(),
        None if carried is None else carried.plain(),
    )
    body = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    if len(body) > MAX_BODY - _TICKET.size:
        raise ValueError(f"they take {len(body):,} bytes, and at most {MAX_BODY:,} can be sent.")
    return body


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


class Acknowledged(NamedTuple):
    """Reports that the worker has read a task, and imports the task's module before Started."""

    result_id: str


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


class TimedOut(NamedTuple):
    """Reports that the running task takes longer than TIMEOUT by the worker's clock."""

    result_id: str


class Result(NamedTuple):
    """Reports how the task ended."""

    result_id: str
    seconds: float  # how long the task's function ran
    return_value: Any  # a JSON value
    # The exception's dotted path, its traceback, and what describe() returns.
    error: tuple[str, str, Description] | None
    message: str | None  # the exception's text
    number: int  # the number of the last Sample; 0 without one
    values: tuple[Any, ...] | None  # the final Progress; None if there is none

    @property
    def last(self) -> tuple[int, Progress | None]:
        """Return the number of the last Sample, and the final Progress, if any."""
        return self.number, None if self.values is None else _progress(self.values)

    def outcome(self) -> Outcome:
        """Return the task's Outcome."""
        if self.error is None:
            return Outcome(return_value=self.return_value)
        path, traceback, description = self.error
        return Outcome(
            error=TaskError(exception_class_path=path, traceback=traceback),
            message=self.message,
            exception=rebuild(description, f"{path}: {self.message}"),  # Django logs it.
        )


class Unreadable(NamedTuple):
    """Stands for a frame that decode() cannot read; no worker sends this message."""

    error: Exception


type SentMessage = Ready | Broken | Acknowledged | Started | Sample | TimedOut | Result
type WorkerMessage = SentMessage | Unreadable

# The first byte of a body is the index of the message's class in this tuple. Its fields follow as a
# pickled tuple.
_KINDS: tuple[type[SentMessage], ...]
_KINDS = (Ready, Broken, Started, Sample, Result, Acknowledged, TimedOut)
_INDEXES = {kind: index for index, kind in enumerate(_KINDS)}

# Most tasks need no other messages than Started, and a Result without value, error and progress.
# For these, the body is the first byte, one number and the result's id. The parent decodes this in
# 0.4 µs, pickle.loads() needs 1 µs, and an Unpickler that refuses classes 2.5 µs.
_SHORT = struct.Struct("!Bd")
_STARTED = _INDEXES[Started]
_DONE = len(_KINDS)


class _PlainUnpickler(pickle.Unpickler):  # noqa: S301 - find_class() refuses all classes
    """Loads plain values only: a body that refers to a class or function is invalid."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"a message refers to {module_name}.{global_name}")


def encode(message: SentMessage) -> bytes:
    """Return the frame of a worker's message. Raises ValueError if it is too long."""
    if type(message) is Started:
        return _encode_short(_STARTED, message.started_at, message.result_id)
    values = pickle.dumps(tuple(message), pickle.HIGHEST_PROTOCOL)
    return frame(bytes((_INDEXES[type(message)],)) + values)


def _encode_short(kind: int, number: float, result_id: str) -> bytes:
    return frame(_SHORT.pack(kind, number) + result_id.encode())


def decode(body: memoryview) -> WorkerMessage:
    """Return the message in the body of a worker's frame; Unreadable if the body has none."""
    try:
        if not body:
            raise ValueError("The length of a message is invalid.")
        kind = body[0]
        if kind in (_STARTED, _DONE):
            number = _SHORT.unpack_from(body)[1]
            result_id = str(body[_SHORT.size :], "utf-8")
            if kind == _STARTED:
                return Started(result_id, number)
            return Result(result_id, number, None, None, None, 0, None)
        values = _PlainUnpickler(io.BytesIO(body[1:])).load()
        message: WorkerMessage = _KINDS[kind](*values)
        if values and type(values[0]) is not str:  # The result's id, or the text of Broken.
            raise TypeError(f"The first value of a message is no text: {values[0]!r}")
    except Exception as error:  # noqa: BLE001 - pickle may raise anything for wrong bytes
        return Unreadable(error)
    return message


def encode_sample(result_id: str, number: int, progress: Progress) -> bytes:
    """Return the frame of a Sample with this Progress."""
    return encode(Sample(result_id, number, _progress_values(progress)))


def encode_result(
    result_id: str, seconds: float, outcome: Outcome, last: tuple[int, Progress | None]
) -> bytes:
    """Return the frame of a Result; of a failure if the return value is too long for a frame."""
    number, progress = last
    values = None if progress is None else _progress_values(progress)
    if outcome.error is not None:
        assert outcome.exception is not None
        description = describe(outcome.exception)
        error = outcome.error.exception_class_path, outcome.error.traceback, description
        message = outcome.message
        return encode(Result(result_id, seconds, None, error, message, number, values))
    if outcome.return_value is None and values is None:
        return _encode_short(_DONE, seconds, result_id)
    try:
        return encode(Result(result_id, seconds, outcome.return_value, None, None, number, values))
    except Exception as exception:  # noqa: BLE001 - it may be nested too deep or too long
        failed = Outcome.failure(exception)
    return encode_result(result_id, seconds, failed, last)


def to_datetime(timestamp: float) -> datetime:
    """Return a timestamp as datetime: aware, in UTC, if USE_TZ is True, else naive local time."""
    return datetime.fromtimestamp(timestamp, UTC if settings.USE_TZ else None)


def _progress(values: tuple[Any, ...]) -> Progress:
    return Progress(**dict(zip(_PROGRESS_FIELDS, values, strict=True)))
