"""Fixtures for all tests. Around every test a check that nothing was left behind."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from django.tasks import TaskResult

from django_tasks_local import pools
from django_tasks_local.events import TaskEvent
from django_tasks_local.hub import hub
from tests.browser import browser, page  # noqa: F401 - fixtures
from tests.project import tasks

type AnyResult = TaskResult[Any, Any]

LIMIT = tasks.LIMIT


def pytest_configure() -> None:
    """Let Ctrl-C reach what tests start; a shell ignores it for a command in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """Fail a test that leaves a task running or a subscription open."""
    yield
    for gate in tasks.gates.values():
        gate.set()
    tasks.gates.clear()
    tasks.notes.clear()
    wait_until(lambda: not any(pool._jobs for pool in pools._pools.values()), "tasks still run")
    wait_until(lambda: not hub._channels and not hub.everything, "subscriptions are open")


@pytest.fixture(params=["threads", "processes"])
def alias(request: pytest.FixtureRequest) -> str:
    """The alias of a backend of each kind, as settings_with() names them."""
    kind: str = request.param
    return kind


@pytest.fixture
def gate(tmp_path: Path) -> str:
    """The path of a gate, closed, at which tasks wait until `tasks.gates[gate].set()`."""
    path = str(tmp_path / "gate")
    tasks.gates[path] = tasks.Gate(path)
    return path


def wait_until(condition: Callable[[], object], failure: str) -> None:
    """Wait for what has no event of its own to wait for; never longer than LIMIT."""
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert time.monotonic() < deadline, failure
        time.sleep(0.005)


def wait_for_event(result_id: str, condition: Callable[[TaskEvent], object]) -> TaskEvent:
    """Return the first event that fits; fail when the task ends before, or after LIMIT."""
    deadline = time.monotonic() + LIMIT
    with hub.subscribe(result_id) as subscription:
        while events := subscription.take(timeout=deadline - time.monotonic()):
            for event in events:
                if condition(event):
                    return event
    raise AssertionError(f"No such event; the last one was {hub.snapshot(result_id)}")


def finished(result: AnyResult) -> AnyResult:
    """Wait for a task's end and return its result, brought up to date."""
    wait_for_event(result.id, lambda event: event.is_last)
    result.refresh()
    return result


def running(result: AnyResult) -> AnyResult:
    """Wait until a task has begun to report, and return its result, brought up to date."""
    wait_for_event(result.id, lambda event: event.progress is not None)
    result.refresh()
    return result


class ServerThread:
    """A real uvicorn in a thread of this process, so that a test shares its hub and its tasks."""

    def __init__(self) -> None:
        from tests.project.asgi import application  # needs django.setup()

        config = uvicorn.Config(application, port=0, log_level="error", lifespan="off")
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, name="test-server", daemon=True)

    def __enter__(self) -> str:
        self.thread.start()
        wait_until(lambda: self.server.started, "uvicorn does not start")
        port = self.server.servers[0].sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{port}"

    def __exit__(self, *exc_info: object) -> None:
        self.server.should_exit = True
        self.thread.join(LIMIT)


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """The URL of the tests' project under uvicorn, in this process."""
    with ServerThread() as url:
        yield url
