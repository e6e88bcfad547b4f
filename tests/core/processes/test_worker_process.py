"""WorkerProcess, the parent's object for a worker: its legal moves, its socket and its end."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest

from django_tasks_local.exceptions import TaskCancelled, TaskTimeout
from django_tasks_local.execution import Outcome
from django_tasks_local.processes import ending, facilities
from django_tasks_local.processes.deadlines import act_on_deadline
from django_tasks_local.processes.frames import CANCEL, HEADER, FrameReader
from django_tasks_local.processes.wire import (
    Ready,
    Started,
    decode,
    decode_task,
    encode,
    encode_result,
    frame_task,
)
from django_tasks_local.processes.worker_process import (
    FALLBACK_SECONDS,
    KILL_AFTER,
    PATIENCE,
    RETIRE_TIME,
)
from django_tasks_local.processes.worker_state import State
from tests.support.fake_worker import FakeWorker, new_task
from tests.support.systems import needs_tickets

STARTING, IDLE, BUSY, ENDING, DEAD = State
LEGAL = {
    (STARTING, IDLE),
    (STARTING, ENDING),
    (STARTING, DEAD),
    (IDLE, BUSY),
    (IDLE, ENDING),
    (IDLE, DEAD),
    (BUSY, BUSY),
    (BUSY, IDLE),
    (BUSY, ENDING),
    (BUSY, DEAD),
    (ENDING, ENDING),
    (ENDING, DEAD),
}
# Maps each state to the moves that lead to it from STARTING.
WAYS = {
    STARTING: (),
    IDLE: (IDLE,),
    BUSY: (IDLE, BUSY),
    ENDING: (ENDING,),
    DEAD: (DEAD,),
}


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWorker]:
    """
    Return a FakeWorker in the state STARTING; close it after the test.

    Its system lets processes handle SIGTERM, even if the test runs on Windows.
    """
    monkeypatch.setattr(facilities, "HANDLES_SIGTERM", True)
    fake = FakeWorker()
    yield fake
    fake.close()


def busy(worker: FakeWorker, *ids: str) -> FakeWorker:
    """
    Let the worker report that it is ready, then give it a task for each id, by default one task.
    """
    worker.parent.become_ready()
    for id in ids or ("id",):
        assert worker.parent.give([new_task(id)])
    return worker


def result(id: str, outcome: Outcome | None = None) -> Any:
    """Return the decoded message that a worker sends when the task with this id has ended."""
    [body] = FrameReader().feed(encode_result(id, 0.1, outcome or Outcome(), (0, None)))
    return decode(body)


# The states of a worker


@pytest.mark.parametrize(("before", "after"), list(product(State, State)))
def test_only_legal_moves_are_made(worker: FakeWorker, before: State, after: State) -> None:
    for state in WAYS[before]:
        worker.parent._move(state)
    assert worker.parent.state is before
    if (before, after) in LEGAL:
        worker.parent._move(after)
        assert worker.parent.state is after
    else:
        with pytest.raises(RuntimeError, match=r"fake@1 cannot move from State\.\w+ to State\.\w+"):
            worker.parent._move(after)
        assert worker.parent.state is before


@pytest.mark.parametrize("state", list(State))
def test_predicates(worker: FakeWorker, state: State) -> None:
    for step in WAYS[state]:
        worker.parent._move(step)
    assert worker.parent.is_available() is (state is IDLE)
    assert worker.parent.counts_as_serving() is (state in {STARTING, IDLE, BUSY})


def test_a_move_replaces_the_deadline(worker: FakeWorker) -> None:
    assert not worker.parent.has_expired(worker.now)
    worker.parent.terminate()
    assert worker.parent.deadline == worker.now + KILL_AFTER
    assert not worker.parent.has_expired(worker.now)
    assert worker.parent.has_expired(worker.now + KILL_AFTER)
    act_on_deadline(worker.parent, 2.0)
    assert worker.parent.deadline is None


def test_a_suspension_postpones_the_deadline(worker: FakeWorker) -> None:
    """A worker gets the time again in which its parent process was suspended."""
    worker.parent.terminate(TaskCancelled(), None)
    worker.parent.postpone(3600)
    assert not worker.parent.has_expired(worker.now + 3600)
    assert worker.parent.has_expired(worker.now + 3600 + KILL_AFTER)


def test_the_life_of_a_worker(worker: FakeWorker) -> None:
    parent = worker.parent
    assert not parent.give([new_task()])
    parent.become_ready()
    assert parent.was_ready
    task = new_task()
    assert parent.give([task])
    assert parent.state is BUSY
    assert task.sends == 1
    assert parent.first_task is task
    parent.start_first(timeout=None)
    assert task.has_started
    assert not task.body
    assert parent.deadline is None
    parent.end_first()
    assert (parent.state, parent.completed, parent.first_task) == (IDLE, 1, None)
    parent.retire()
    assert (parent.state, parent.deadline) == (ENDING, worker.now + RETIRE_TIME)
    assert worker.sock.recv(1000)
    assert worker.sock.recv(1000) == b"", (
        "retire() must close the socket, so that the worker reads its end"
    )
    assert not parent.give([new_task()])
    assert parent.bury() == "The worker process fake@1 ended with exit code 0"
    assert parent.state is DEAD


def test_a_worker_that_is_told_to_end_while_it_starts_gets_no_task(worker: FakeWorker) -> None:
    worker.parent.terminate()
    worker.parent.become_ready()
    assert worker.parent.state is ENDING
    assert not worker.parent.give([new_task()])


def test_an_outdated_worker_gets_no_task(worker: FakeWorker) -> None:
    worker.parent.become_ready()
    worker.parent.is_outdated = True
    assert not worker.parent.is_available()
    assert not worker.parent.give([new_task()])
    assert worker.parent.must_retire(max_tasks=None)


def test_a_worker_retires_after_max_tasks(worker: FakeWorker) -> None:
    busy(worker)
    assert not worker.parent.must_retire(max_tasks=1)
    worker.parent.start_first(None)
    worker.parent.end_first()
    assert worker.parent.must_retire(max_tasks=1)
    assert not worker.parent.must_retire(max_tasks=2)


# Stopping a worker


def test_terminate_then_kill(worker: FakeWorker) -> None:
    busy(worker)
    worker.parent.terminate()
    worker.parent.terminate()
    assert worker.process.calls == ["terminate"], "the worker must receive SIGTERM once"
    act_on_deadline(worker.parent, 2.0)
    assert worker.process.calls == ["terminate", "kill"]


def test_frame_replaces_signal_that_cannot_be_handled(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Windows a worker with a task gets the frame CANCEL; it is killed if it does not end."""
    monkeypatch.setattr(facilities, "HANDLES_SIGTERM", False)
    busy(worker)
    worker.sock.recv(1 << 16)
    worker.parent.terminate()
    assert worker.sock.recv(1 << 16) == CANCEL
    assert worker.process.calls == []
    assert worker.parent.deadline == worker.now + KILL_AFTER
    act_on_deadline(worker.parent, 2.0)
    assert worker.process.calls == ["kill"]


def test_worker_without_task_is_ended_at_once(
    worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(facilities, "HANDLES_SIGTERM", False)
    worker.parent.become_ready()
    worker.parent.terminate()
    assert worker.process.calls == ["terminate"]


def test_a_retired_worker_that_does_not_end_is_terminated(worker: FakeWorker) -> None:
    worker.parent.become_ready()
    worker.parent.retire()
    act_on_deadline(worker.parent, 2.0)
    assert worker.process.calls == ["terminate"]
    assert worker.parent.deadline == worker.now + KILL_AFTER


def test_timeout(worker: FakeWorker) -> None:
    busy(worker)
    worker.parent.start_first(timeout=2)
    assert worker.parent.deadline == worker.now + 2 + FALLBACK_SECONDS
    act_on_deadline(worker.parent, 2.0)
    assert isinstance(worker.parent.reason, TaskTimeout)
    assert str(worker.parent.reason) == "The task took longer than 2.0 seconds."
    assert worker.process.calls == ["terminate"]


@needs_tickets
def test_no_timeout_if_the_next_task_has_begun(worker: FakeWorker) -> None:
    """
    The timeout of a task no longer applies when the worker has begun its next task.

    The worker sends the result of the first task together with the report that the next one
    started.
    """
    busy(worker)
    worker.parent.start_first(timeout=2)
    assert worker.parent.give_ahead([new_task("next"), new_task("last")])
    assert worker.reader.take(1)
    assert [task.id for task in worker.parent.recall()] == ["last"]
    act_on_deadline(worker.parent, 2.0)
    assert worker.parent.state is BUSY
    assert worker.parent.deadline is None
    assert worker.process.calls == []


@needs_tickets
def test_a_task_that_waits_behind_a_long_one_is_recalled(worker: FakeWorker) -> None:
    busy(worker)
    assert worker.parent.give_ahead([new_task("next")])
    assert not worker.parent.has_expired(worker.now)
    assert worker.parent.has_expired(worker.now + PATIENCE)
    assert [task.id for task in worker.parent.recall()] == ["next"]
    assert not worker.parent.has_expired(worker.now + PATIENCE)


@needs_tickets
def test_only_a_busy_worker_is_sent_tasks_ahead(worker: FakeWorker) -> None:
    assert not worker.parent.give_ahead([new_task()])
    worker.parent.become_ready()
    assert not worker.parent.give_ahead([new_task()])
    assert worker.parent.give([new_task()])
    assert not worker.parent.give([new_task()])
    assert worker.parent.give_ahead([new_task("next")])
    worker.parent.terminate()
    assert not worker.parent.give_ahead([new_task("last")])


def test_a_busy_worker_does_not_retire(worker: FakeWorker) -> None:
    busy(worker)
    worker.parent.retire()
    assert worker.parent.state is BUSY


@pytest.mark.parametrize(
    ("reason", "outcome", "overruled"),
    [
        (None, Outcome(), False),
        (TaskCancelled(), Outcome(), False),
        (TaskCancelled(), Outcome.failure(ValueError()), True),
        (TaskTimeout(), Outcome(), True),
    ],
)
def test_the_reason_of_a_stop_overrules_the_result(
    worker: FakeWorker, reason: BaseException | None, outcome: Outcome, overruled: bool
) -> None:
    busy(worker)
    worker.parent.start_first(None)
    worker.parent.terminate(reason, worker.parent.first_task)
    assert worker.parent.overrules(result("id", outcome)) is overruled


def test_a_worker_that_was_terminated_did_not_fail_to_start(worker: FakeWorker) -> None:
    assert worker.parent.never_became_ready()
    worker.parent.terminate()
    assert not worker.parent.never_became_ready()


@pytest.mark.parametrize(
    ("exitcode", "text", "killed"),
    [
        (0, "ended with exit code 0", False),
        (-15, "was killed by SIGTERM", False),
        (-250, "ended with exit code -250", False),
        (None, "ended with exit code None", True),
        (ending.LOST_EXIT_CODE, "ended with exit code 255", True),
    ],
)
def test_how_it_ended(exitcode: int | None, text: str, killed: bool) -> None:
    worker = FakeWorker(exitcode)
    assert worker.parent.bury() == f"The worker process fake@1 {text}"
    assert ("kill" in worker.process.calls) is killed
    worker.close()


# The socket of a worker


def test_messages_are_received(worker: FakeWorker) -> None:
    assert worker.parent.connection.receive() == []
    worker.sock.send(encode(Ready()) + encode(Started("id", 1.5)))
    assert worker.parent.connection.receive() == [Ready(), Started("id", 1.5)]
    worker.sock.close()
    with pytest.raises(EOFError):
        worker.parent.connection.receive()


def test_what_a_dead_worker_has_sent_is_received(worker: FakeWorker) -> None:
    long = Started("x" * 100_000, 1.5)
    worker.sock.send(encode(long) + encode(Ready()) + HEADER.pack(10) + b"half")
    worker.sock.close()
    assert list(worker.parent.connection.receive_rest()) == [long, Ready()]


def test_a_task_that_the_socket_does_not_accept_at_once_is_flushed(worker: FakeWorker) -> None:
    worker.parent.become_ready()
    task = new_task("id", "x" * 5_000_000)
    expected = frame_task(task.body)
    assert worker.parent.give([task])
    assert worker.parent.connection.has_unsent
    received = bytearray()
    while len(received) < len(expected):
        received += worker.sock.recv(1 << 20)
        worker.parent.connection.flush()
    assert received == expected
    assert not worker.parent.connection.has_unsent
    [body] = FrameReader().feed(bytes(received))
    assert decode_task(body).result_id == "id"


def test_sending_to_a_dead_worker_is_harmless(worker: FakeWorker) -> None:
    worker.parent.become_ready()
    worker.sock.close()
    task = new_task()
    assert worker.parent.give([task])
    assert not worker.parent.connection.has_unsent
    assert not task.has_started


def test_nothing_is_sent_to_a_socket_that_is_closed(worker: FakeWorker) -> None:
    worker.parent.become_ready()
    assert worker.parent.give([new_task("id", "x" * 5_000_000)])
    worker.parent.note_end()
    assert not worker.parent.connection.has_unsent
    assert worker.parent.deadline == worker.now + KILL_AFTER
