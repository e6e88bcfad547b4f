"""Fixtures for all tests, and the hook that adds the markers `servers` and `browser` to tests."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from django_tasks_local import pools
from django_tasks_local.hub import hub
from tests.project import tasks
from tests.support.browser import browser, page  # noqa: F401 - fixtures
from tests.support.servers import ServerThread
from tests.support.waiting import wait_until

TESTS = Path(__file__).parent


def pytest_configure() -> None:
    """
    Restore SIGINT for the processes that tests start, because shells ignore it in background jobs.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


# Tests outside of tests/servers that run whole programs, kill worker processes or install packages.
# They take three quarters of the time of all tests outside of tests/servers and tests/browser.
PROGRAMS = (
    "core/django_suite",
    "core/processes/test_deadlines.py",
    "core/processes/test_ending.py",
    "core/processes/test_facilities.py",
    "core/processes/test_invalid_frames.py",
    "core/processes/test_loading.py",
    "core/processes/test_multiprocessing_limits.py",
    "core/processes/test_processes.py",
    "core/processes/test_settings.py",
    "core/processes/test_worker.py",
    "core/test_databases.py",
    "core/test_fork.py",
    "core/test_logs.py",
    "core/test_script_end.py",
    "core/test_shutdown.py",
    "repository/test_packaging.py",
    "repository/test_published_2_0.py",
    "stress",
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """
    Add the marker `servers` to tests/servers and PROGRAMS, and `browser` to tests with a browser.
    """
    for item in items:
        path = item.path.relative_to(TESTS)
        folder = path.parts[0]
        if folder in ("servers", "browser"):
            item.add_marker(folder)
        if path.as_posix().startswith(PROGRAMS):
            item.add_marker("servers")
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """
    Open all gates after each test; fail a test whose tasks still run or whose subscriptions are
    open.
    """
    yield
    for gate in tasks.gates.values():
        gate.set()
    tasks.gates.clear()
    tasks.notes.clear()
    wait_until(
        lambda: not any(pool.statistics().unfinished for pool in pools.all_pools()),
        "tasks still run after the test",
    )
    wait_until(lambda: hub.statistics().subscriptions == 0, "subscriptions are open after the test")


@pytest.fixture(params=["threads", "processes"])
def alias(request: pytest.FixtureRequest) -> str:
    """Return "threads" and then "processes", the two aliases that settings_with() defines."""
    kind: str = request.param
    return kind


@pytest.fixture
def gate(tmp_path: Path) -> str:
    """
    Return the path of a closed Gate; `tasks.wait_for(gate)` blocks until `tasks.gates[gate].set()`.
    """
    path = str(tmp_path / "gate")
    tasks.gates[path] = tasks.Gate(path)
    return path


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    """Serve the tests' project with uvicorn in a thread of this process; return its URL."""
    with ServerThread() as url:
        yield url
