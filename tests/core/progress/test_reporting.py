"""A task creates its Reporter and its Cancellation at their first use."""

import logging
import threading
from typing import Any

import pytest
from django.tasks import task

from django_tasks_local import report_progress, track
from django_tasks_local.progress.reporter import Reporter, current_reporting
from django_tasks_local.testing import wait_until_idle
from tests.support.stage import Stage
from tests.support.waiting import LIMIT


def made() -> list[bool]:
    run = current_reporting.get()
    return [run.reporter is not None, run.cancellation is not None]


@task
def report_nothing() -> list[bool]:
    return made()


@task
def report() -> list[bool]:
    report_progress(1)
    first = current_reporting.get().reporter
    report_progress(2)
    assert current_reporting.get().reporter is first
    return made()


@task
def track_items() -> list[bool]:
    for _ in track([1, 2]):
        pass
    return made()


@pytest.mark.parametrize(
    ("function", "expected"), [(report_nothing, False), (report, True), (track_items, True)]
)
@pytest.mark.parametrize("backend", ["default", "immediate"])
def test_the_first_use_makes_them(function: Any, expected: bool, backend: str) -> None:
    result = function.using(backend=backend).enqueue()
    wait_until_idle(backend)
    if backend == "default":
        result.refresh()
    assert result.return_value == [expected, expected]


escaped: list[Any] = []


@task
def escape() -> None:
    """Keep the task's Reporting, as a thread that outlives its task does."""
    escaped.append(current_reporting.get())


def test_a_report_after_the_end_has_no_effect(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "django_tasks_local")
    escape.enqueue()
    wait_until_idle()
    run = escaped.pop()
    run.get_reporter().report(1)
    assert "reported progress after it was finished" in caplog.text
    assert run.close_progress() == (0, None)


class NoteLock(logging.Handler):
    """
    A log handler that records whether another thread can take the reporter's lock during emit().
    """

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self.reporter = reporter
        self.was_free: list[bool] = []

    def emit(self, record: logging.LogRecord) -> None:
        thread = threading.Thread(target=self.take)
        thread.start()
        thread.join(LIMIT)

    def take(self) -> None:
        free = self.reporter._lock.acquire(blocking=False)
        self.was_free.append(free)
        if free:
            self.reporter._lock.release()


def test_log_record_of_a_late_report_is_handled_without_a_lock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    The reporter releases its lock before it logs a late report.

    A log handler holds its own lock and may report progress, which needs the lock of a task. Two
    threads that take these two locks in opposite orders could deadlock.
    """
    reporter = Stage().reporter
    reporter.close()
    handler = NoteLock(reporter)
    logger = logging.getLogger("django_tasks_local.progress.reporter")
    monkeypatch.setattr(logger, "handlers", [handler])
    monkeypatch.setattr(logger, "level", logging.DEBUG)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    reporter.report(1)
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    assert handler.was_free == [True]
