"""Log filters, log handlers and connections that raise end neither a worker nor the dispatcher."""

import ctypes
import logging
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.cache.backends.locmem import LocMemCache
from django.tasks import task_backends
from django.test import override_settings

from django_tasks_local import forking, logs
from django_tasks_local.execution import connections as resources
from django_tasks_local.processes.loop import Loop
from django_tasks_local.testing import wait_until_idle
from django_tasks_local.ticker import Ticker
from tests.project import process_tasks, tasks
from tests.support.backends import settings_with
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT, finished, wait_until


class BrokenFilter(logging.Filter):
    """A filter that reads an attribute that only log records of requests have."""

    def __init__(self, error: type[BaseException] = AttributeError) -> None:
        super().__init__()
        self.error = error

    def filter(self, record: logging.LogRecord) -> bool:
        raise self.error(f"'LogRecord' object has no attribute 'request': {record.name}")


@pytest.fixture(params=[AttributeError, SystemExit])
def broken_logging(request: pytest.FixtureRequest) -> Iterator[None]:
    """A handler of the root logger with a BrokenFilter."""
    handler = logging.StreamHandler()
    handler.addFilter(BrokenFilter(request.param))
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)


@pytest.mark.parametrize("backend", ["threads", "processes"])
def test_log_filter_that_raises_stops_no_pool(
    broken_logging: None, backend: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failing tasks get their outcome, and later tasks run, although no record can be logged."""
    with settings_with(MAX_WORKERS=2):
        results = [tasks.fail.using(backend=backend).enqueue() for _ in range(6)]
        assert [finished(result).status for result in results] == ["FAILED"] * 6
        assert finished(tasks.add.using(backend=backend).enqueue(1)).return_value == 2
        wait_until_idle(backend, LIMIT)
    written = capsys.readouterr().err
    assert f"A receiver failed for task id={results[0].id}." in written
    assert "'LogRecord' object has no attribute 'request'" in written


def test_message_that_cannot_be_logged_is_written_to_stderr(
    broken_logging: None, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = logs.get_logger("django_tasks_local.test")
    logger.warning("100%")
    logger.warning("no argument for %s")
    try:
        raise ValueError("the reason")
    except ValueError:
        logger.exception("task %s", 7)
    written = capsys.readouterr().err
    assert written.startswith("100%\nTraceback")
    assert "\nno argument for %s\nTraceback" in written
    assert "\ntask 7\nTraceback" in written
    assert "the reason" in written


def test_log_record_has_the_line_of_the_caller(caplog: pytest.LogCaptureFixture) -> None:
    logger = logs.get_logger("django_tasks_local.test")
    logger.warning("a warning")
    try:
        raise ValueError
    except ValueError:
        logger.exception("an exception")
    name = "test_log_record_has_the_line_of_the_caller"
    assert [record.funcName for record in caplog.records] == [name, name]
    assert caplog.records[1].exc_info is not None


def test_each_logger_is_safe() -> None:
    """Each module uses get_logger(), so that no log call of this package can raise."""
    for package in ("django_tasks_local", "django_tasks_local_sse"):
        for path in (ROOT / package).rglob("*.py"):
            lines = re.findall(r"^.*\blogging\.getLogger\(.*", path.read_text(), re.MULTILINE)
            # pools.signals only asks this logger whether it is enabled.
            allowed = ['_tasks_logger = logging.getLogger("django.tasks")']
            assert lines in ([], allowed) or path.name == "logs.py", path


class ExitingCache(LocMemCache):
    """A cache that raises SystemExit when it is closed."""

    def close(self, **kwargs: object) -> None:
        raise SystemExit("the cache")


def test_task_has_an_outcome_if_its_cleanup_raises_system_exit(
    caplog: pytest.LogCaptureFixture,
) -> None:
    path = f"{__name__}.{ExitingCache.__qualname__}"
    with (
        settings_with(MAX_WORKERS=1),
        override_settings(CACHES={"default": {"BACKEND": path}}),
    ):
        result = finished(tasks.use_cache.enqueue())
        assert result.errors[0].exception_class is SystemExit
        assert finished(tasks.add.enqueue(1)).return_value == 2
        wait_until_idle(timeout=LIMIT)
    assert "An error in the worker thread" in caplog.text


def test_exception_raised_in_an_idle_worker_thread_does_not_end_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A library for time limits may raise an exception in a thread after its task has ended."""
    with settings_with(MAX_WORKERS=1):
        finished(tasks.noop.enqueue())
        backend: Any = task_backends["default"]
        wait_until(lambda: backend._pool._idle, "the worker is busy")
        [ident] = [t.ident for t in threading.enumerate() if t.name == "django-tasks-default-0"]
        raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
        assert raise_in(ctypes.c_ulong(ident or 0), ctypes.py_object(TimeoutError)) == 1
        results = [tasks.add.enqueue(number) for number in range(3)]
        assert [finished(result).return_value for result in results] == [1, 2, 3]
        assert backend.statistics().workers == 1
    assert "An error in the worker thread" in caplog.text


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_worker_thread_that_ends_frees_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another worker runs the waiting tasks after an error that the worker cannot handle."""
    with settings_with(MAX_WORKERS=1):
        backend: Any = task_backends["default"]
        serve = backend._pool._serve
        ended = []

        def end_once(worker_id: str) -> bool:
            if not ended:
                ended.append(threading.current_thread())
                raise MemoryError
            done: bool = serve(worker_id)
            return done

        monkeypatch.setattr(backend._pool, "_serve", end_once)
        assert finished(tasks.add.enqueue(1)).return_value == 2
        ended[0].join(LIMIT)
        assert backend.statistics().workers == 1


def test_ticker_continues_after_an_error_that_cannot_be_logged(broken_logging: None) -> None:
    ticker = Ticker()
    ticked = threading.Event()

    class Failing:
        def tick(self) -> None:
            raise KeyboardInterrupt

    class Noting:
        def tick(self) -> None:
            ticked.set()

    ticker.add(Failing(), 0.0)
    ticker.add(Noting(), 0.0)
    assert ticked.wait(LIMIT), "the ticker's thread has ended"


def test_child_of_fork_is_reset_although_an_error_cannot_be_logged(
    broken_logging: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []

    def fail() -> None:
        raise RuntimeError

    monkeypatch.setattr(forking, "_resets", [fail, lambda: called.append("reset")])
    forking._reset_all()
    assert called == ["reset"]


@pytest.mark.django_db(transaction=True)
def test_error_of_an_idle_worker_does_not_begin_with_an_internal_index_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """pytest-django blocks the database, so closing a thread's connection raises an error."""

    def close_old_connections() -> None:
        raise RuntimeError("Database access not allowed")

    with settings_with(MAX_WORKERS=1):
        finished(tasks.query.enqueue("connection"))
        wait_until_idle(timeout=LIMIT)
        monkeypatch.setattr(resources, "close_old_connections", close_old_connections)
        finished(tasks.noop.enqueue())
        wait_until_idle(timeout=LIMIT)
    errors = [record.exc_info[1] for record in caplog.records if record.exc_info]
    assert errors
    assert [error.__context__ for error in errors if error] == [None] * len(errors)


# The dispatcher


def loop_of_processes() -> Loop:
    """Return the loop of the dispatcher of the backend "processes"."""
    backend: Any = task_backends["processes"]
    loop: Loop = backend._pool.dispatcher._loop
    return loop


def break_loop(loop: Loop) -> None:
    """Let the next select() of the loop raise, as after a program has closed its descriptor."""

    def select(timeout: float | None) -> Any:
        raise OSError("[Errno 9] Bad file descriptor")

    loop._selector.select = select  # type: ignore[method-assign,assignment]
    loop.wake()


@pytest.mark.parametrize("logging_fails", [False, True])
def test_dispatcher_that_ends_fails_its_tasks_and_is_started_again(
    tmp_path: Path, logging_fails: bool, request: pytest.FixtureRequest
) -> None:
    """Running and waiting tasks fail with the reason; the next enqueue() starts a dispatcher."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    if logging_fails:
        handler = logging.StreamHandler()
        handler.addFilter(BrokenFilter())
        logging.getLogger().addHandler(handler)
        request.addfinalizer(lambda: logging.getLogger().removeHandler(handler))
    with settings_with(MAX_WORKERS=1):
        gated = process_tasks.gated.using(backend="processes")
        results = [gated.enqueue(str(fifo)) for _ in range(3)]
        wait_until(lambda: statistics().running == 1, "no task runs")
        pid = int(task_backends["processes"]._pool.workers()[0].worker_id.rpartition("@")[2])  # type: ignore[attr-defined]
        break_loop(loop_of_processes())
        for result in results:
            finished(result)
            assert "WorkerDied" in result.errors[0].exception_class_path
            assert "Bad file descriptor" in result.errors[0].traceback
        noop = process_tasks.noop.using(backend="processes")
        assert finished(noop.enqueue()).status == "SUCCESSFUL"
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the old worker still runs")
        wait_until_idle("processes", LIMIT)


def statistics() -> Any:
    """Return the statistics of the backend "processes"."""
    return task_backends["processes"].statistics()  # type: ignore[attr-defined]
