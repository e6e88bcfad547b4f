"""Worker processes on a system without the facilities that Windows lacks."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.tasks import TaskResultStatus, task_backends
from django.test import override_settings

from django_tasks_local import cancel
from django_tasks_local.processes import facilities
from django_tasks_local.processes.connection import socketpair
from django_tasks_local.processes.frames import CANCEL, frame
from django_tasks_local.processes.receiver import ReceiverThread
from tests.project import process_tasks as tasks
from tests.support.systems import kill
from tests.support.waiting import LIMIT, finished, running, wait_until


@pytest.fixture(scope="module", autouse=True)
def without_facilities() -> Iterator[None]:
    """Use one worker process, and neither its sentinel in a selector, nor tickets, nor SIGTERM."""
    backend = {
        "BACKEND": "django_tasks_local.ProcessPoolBackend",
        "OPTIONS": {"MAX_WORKERS": 1},
    }
    with pytest.MonkeyPatch.context() as patch:
        for name in ("SELECTS_SENTINELS", "HAS_TICKETS", "HANDLES_SIGTERM"):
            patch.setattr(facilities, name, False)
        with override_settings(TASKS={"default": backend}):
            yield
            task_backends["default"].close()  # type: ignore[attr-defined]


def workers() -> Any:
    return task_backends["default"]._pool.workers()  # type: ignore[attr-defined]


def test_tasks_run_one_after_another() -> None:
    results = [tasks.whoami.enqueue() for _ in range(20)]
    assert {finished(result).return_value[0] for result in results} == {workers()[0].process.pid}


@pytest.mark.parametrize("task", [tasks.until_cancelled, tasks.async_until_cancelled])
def test_cancelled_task_cleans_up(task: Any, tmp_path: Path) -> None:
    """The frame CANCEL raises TaskCancelled in a function, and cancels a coroutine."""
    marker = tmp_path / "marker"
    result = running(task.enqueue(str(marker)))
    assert cancel(result.id)
    assert finished(result).errors[0].exception_class_path.endswith(".TaskCancelled")
    assert marker.read_text(encoding="utf-8") == "cleaned up"


def test_task_that_catches_its_cancellation_succeeds(tmp_path: Path) -> None:
    result = running(tasks.until_cancelled.enqueue(str(tmp_path / "marker"), swallow=True))
    assert cancel(result.id)
    assert finished(result).return_value == "swallowed"


def test_task_that_does_not_end_is_killed() -> None:
    """C code handles no signal, so the dispatcher kills the worker after KILL_AFTER seconds."""
    result = running(tasks.run_c_code.enqueue())
    assert cancel(result.id)
    assert finished(result).errors[0].exception_class_path.endswith(".TaskCancelled")


@pytest.mark.parametrize("when", ["before it is ready", "while it is idle"])
def test_death_of_worker_is_noticed(when: str) -> None:
    """A thread waits for the end of the process, since its socket may stay open."""
    wait_until(lambda: not workers() or workers()[0].was_ready, "the worker is not ready")
    result = tasks.noop.enqueue()
    if when == "while it is idle":
        finished(result)
    wait_until(workers, "no worker is started")
    [dead] = workers()
    kill(dead.process.pid)
    wait_until(lambda: dead not in workers(), "the dispatcher does not notice the death")
    assert finished(result).status == TaskResultStatus.SUCCESSFUL
    assert finished(tasks.noop.enqueue()).status == TaskResultStatus.SUCCESSFUL


# Parts


def test_receiver_thread_divides_frames_of_tasks_and_of_cancellation() -> None:
    cancelled: list[None] = []
    ours, theirs = socketpair()
    with ours, theirs:
        receiver = ReceiverThread(theirs, lambda: cancelled.append(None))
        ours.sendall(frame(b"first"))
        assert receiver.receive() == [b"first"]
        assert not cancelled
        ours.sendall(CANCEL + frame(b"second"))
        bodies: list[memoryview] = []
        while not bodies:
            bodies += receiver.receive() or []
        assert bodies == [b"second"]
        assert cancelled == [None]
        ours.shutdown(socket.SHUT_WR)
        assert receiver.receive() is None


def test_sockets_of_tcp_send_without_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no other kind of socketpair()."""

    def tcp_pair() -> tuple[socket.socket, socket.socket]:
        with socket.create_server(("127.0.0.1", 0)) as server:
            client = socket.create_connection(server.getsockname(), LIMIT)
            return client, server.accept()[0]

    monkeypatch.setattr(socket, "socketpair", tcp_pair)
    for sock in socketpair():
        with sock:
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
