"""The protocol between a process pool and its workers: frames, messages and outcomes of tasks."""

import pickle
from datetime import UTC, datetime
from traceback import format_exception
from typing import Any

import pytest
from django.test import override_settings
from hypothesis import given
from hypothesis import strategies as st

from django_tasks_local.events import Progress
from django_tasks_local.execution import Outcome
from django_tasks_local.processes import frames, wire
from django_tasks_local.processes.frames import HEADER, MAX_BODY, FrameReader, frame
from django_tasks_local.processes.remote_errors import RemoteError
from django_tasks_local.processes.wire import (
    Broken,
    Ready,
    Result,
    RunTask,
    Sample,
    Started,
    Unreadable,
    decode,
    decode_task,
    encode,
    encode_result,
    encode_sample,
    encode_task,
    frame_task,
    ticket_of,
    to_datetime,
)
from tests.project import tasks

PROGRESS = Progress(
    current=3,
    total=10,
    percent=30.0,
    message="three",
    unit="pages",
    data={"a": [1]},
    levels=[{"message": "three", "current": 3, "total": 10, "unit": "pages"}] * 2,
    rate=2.0,
)


class Unloadable:
    """An object that can be pickled but raises ValueError when it is unpickled."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


def sent(data: bytes) -> Any:
    """Return the message that the receiver of one encoded frame decodes."""
    [body] = FrameReader().feed(data)
    return decode(body)


@given(st.lists(st.binary(max_size=300)), st.data())
def test_frames_arrive_whole_however_they_are_cut(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(frame(body) for body in bodies)
    reader, found = FrameReader(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        found += [bytes(body) for body in reader.feed(stream[:size])]
        stream = stream[size:]
    assert found == bodies
    assert reader.incomplete == 0


def test_an_incomplete_frame_is_kept() -> None:
    reader = FrameReader()
    data = frame(b"first") + frame(b"second")
    assert [bytes(body) for body in reader.feed(data[:-1])] == [b"first"]
    assert reader.incomplete == len(frame(b"second")) - 1
    assert [bytes(body) for body in reader.feed(data[-1:])] == [b"second"]


def test_bodies_stay_valid_after_the_next_read() -> None:
    reader = FrameReader()
    data = frame(b"x" * 100)
    reader.feed(data[:50])
    [body] = reader.feed(data[50:])
    reader.feed(frame(b"y" * 200))
    assert body == b"x" * 100


@pytest.mark.parametrize(
    "message",
    [
        Ready(),
        Broken("a traceback"),
        Started("id", 1.5),
        Sample("id", 7, (1, 2)),
        Result("id", 0.1, None, None, None, 0, None),
        Result("id", 0.1, [1, {"a": None}], None, None, 0, None),
        Result("id", 0.1, None, ("builtins.ValueError", "a traceback"), "bad", 3, (1, 2)),
    ],
)
def test_messages_arrive_as_they_were(message: Any) -> None:
    received = sent(encode(message))
    assert received == message
    assert type(received) is type(message)


def pickled(kind: int, values: Any) -> bytes:
    """Return the body of a message with these values."""
    return bytes((kind,)) + pickle.dumps(values)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no message",
        b"\x02",
        b"\x02 short",
        b"\x02\0\0\0\0\0\0\0\0\xff no text",
        b"\x05\0",
        pickled(99, ("id",)),
        pickled(0, None),
        pickled(1, ()),
        pickled(3, ("too few fields",)),
        pickled(1, (Unloadable(),)),
        pickled(1, (Progress(),)),
        pickled(1, (print,)),
        bytes((1,)) + b"cos\nsystem\n(S'exit 1'\ntR.",
    ],
)
def test_frame_of_a_worker_creates_no_object_of_another_class(body: bytes) -> None:
    """Wrong bytes are unreadable: they raise nothing, and import and call nothing."""
    assert isinstance(sent(frame(body)), Unreadable)


@given(st.binary(max_size=100))
def test_random_bytes_raise_nothing(body: bytes) -> None:
    assert decode(memoryview(body)) is not None


def test_messages_of_a_worker_are_plain_and_readable() -> None:
    """The frames of an error and of progress have no instance of a class of the application."""
    outcome = Outcome.failure(RuntimeError("bad"))
    for data in (
        encode(Started("id", 1.5)),
        encode_sample("id", 1, PROGRESS),
        encode_result("id", 0.1, outcome, (1, PROGRESS)),
    ):
        assert not isinstance(sent(data), Unreadable)


def test_length_over_the_limit_is_unreadable() -> None:
    """A reader neither waits for the rest of such a frame nor keeps what follows it."""
    reader = FrameReader()
    data = frame(b"first") + HEADER.pack(MAX_BODY + 1) + b"garbage"
    first, invalid = reader.feed(data)
    assert first == b"first"
    assert isinstance(decode(invalid), Unreadable)
    assert reader.incomplete == 0


def test_return_value_over_the_limit_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (frames, wire):
        monkeypatch.setattr(module, "MAX_BODY", 5000)
    result = sent(encode_result("id", 0.5, Outcome("x" * 6000), (0, None)))
    assert result.error[0] == "builtins.ValueError"
    assert "longer than 5,000 bytes" in result.message
    with pytest.raises(ValueError, match="at most 5,000"):
        encode_task("id", tasks.noop, ["x" * 6000], {}, datetime.now(UTC))


def test_progress_arrives_as_it_was() -> None:
    sample = sent(encode_sample("id", 4, PROGRESS))
    assert (sample.result_id, sample.number, sample.progress) == ("id", 4, PROGRESS)
    assert sent(encode_result("id", 0, Outcome(), (5, PROGRESS))).last == (5, PROGRESS)
    assert sent(encode_result("id", 0, Outcome(), (0, None))).last == (0, None)


@pytest.mark.parametrize("value", [None, 0, "", [1, {"a": None}], "x" * 100_000])
def test_return_values(value: Any) -> None:
    outcome = sent(encode_result("id", 0.5, Outcome(value), (0, None))).outcome()
    assert outcome.return_value == value
    assert outcome.error is None


def test_an_error_keeps_its_traceback_and_its_class() -> None:
    try:
        raise ValueError("bad value")
    except ValueError as error:
        failed = Outcome.failure(error)
    outcome = sent(encode_result("id", 0.5, failed, (0, None))).outcome()
    assert failed.error is not None
    assert outcome.error == failed.error
    assert outcome.message == "bad value"
    assert isinstance(outcome.exception, RemoteError)
    assert str(outcome.exception) == "bad value"
    assert "".join(format_exception(outcome.exception)) == failed.error.traceback


def test_a_return_value_that_cannot_be_pickled_is_a_failure() -> None:
    result = sent(encode_result("id", 0.5, Outcome(lambda: None), (2, PROGRESS)))
    assert "pickle" in result.message
    assert result.last == (2, PROGRESS)


def arrived(message: bytes) -> RunTask:
    """Return the RunTask that a worker decodes from an encoded task."""
    [body] = FrameReader().feed(frame_task(message, 7))
    assert ticket_of(body) == 7
    return decode_task(body)


def test_a_task_arrives_as_it_was() -> None:
    enqueued_at = datetime(2026, 5, 4, 3, 2, 1, 999_999, tzinfo=UTC)
    task = tasks.noop.using(queue_name="default")
    message = arrived(encode_task("id", task, [1], {"b": "c"}, enqueued_at))
    assert message.result_id == "id"
    assert message.path == "tests.project.tasks.noop"
    assert message.load() == ((0, "default", "default", None, False), [1], {"b": "c"})
    assert datetime.fromisoformat(message.enqueued_at) == enqueued_at


def test_an_argument_that_cannot_be_loaded_harms_no_other_field() -> None:
    message = arrived(encode_task("id", tasks.noop, [Unloadable()], {}, datetime.now(UTC)))
    assert message.result_id == "id"
    with pytest.raises(ValueError, match="not a number"):
        message.load()


def test_a_workers_time_follows_use_tz() -> None:
    timestamp = datetime(2026, 5, 4, 3, 2, 1, 999_999, tzinfo=UTC).timestamp()
    with override_settings(USE_TZ=True):
        assert to_datetime(timestamp) == datetime(2026, 5, 4, 3, 2, 1, 999_999, tzinfo=UTC)
    with override_settings(USE_TZ=False):
        assert to_datetime(timestamp).tzinfo is None
        assert to_datetime(timestamp).timestamp() == timestamp
