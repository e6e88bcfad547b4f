"""TIMEOUT: its clock, and its effect on tasks in threads."""

import logging
import time
from typing import Any

import pytest
from django.tasks import task

from django_tasks_local import report_progress
from django_tasks_local.exceptions import TaskCancelled
from django_tasks_local.testing import wait_until_idle
from django_tasks_local.time_limit import CHECK_INTERVAL, TimeLimit
from tests.project import tasks
from tests.support.backends import settings_with
from tests.support.stage import FakeTicker
from tests.support.waiting import LIMIT, finished, wait_until


class Stage:
    """A TimeLimit of 10 seconds whose clock the test moves."""

    def __init__(self) -> None:
        self.now = 100.0
        self.expired = 0
        ticker: Any = FakeTicker()
        self.limit = TimeLimit(10.0, self.expire, clock=lambda: self.now, ticker=ticker)
        self.due_at: float | None = ticker.due[0][0]

    def expire(self) -> None:
        self.expired += 1

    def run_for(self, seconds: float) -> None:
        """Let the ticker call tick() at each time that it has requested."""
        until = self.now + seconds
        while self.due_at is not None and self.due_at <= until:
            self.now = self.due_at
            self.due_at = self.limit.tick()
        self.now = until


def test_a_task_expires_once_after_its_time() -> None:
    stage = Stage()
    stage.run_for(9.9)
    assert stage.expired == 0
    stage.run_for(0.1)
    assert (stage.expired, stage.due_at) == (1, None)


def test_a_task_that_has_ended_does_not_expire() -> None:
    """The ticker forgets the time limit of a task that has ended, at its next check."""
    stage = Stage()
    stage.limit.stop()
    stage.run_for(CHECK_INTERVAL)
    assert (stage.expired, stage.due_at) == (0, None)


def test_time_of_a_suspended_process_does_not_count() -> None:
    stage = Stage()
    stage.run_for(5)
    stage.now += 3600
    stage.due_at = stage.limit.tick()
    # The time between the last check before the suspension and the suspension counts fully.
    stage.run_for(5 - CHECK_INTERVAL - 0.1)
    assert stage.expired == 0
    stage.run_for(CHECK_INTERVAL + 0.1)
    assert stage.expired == 1


@task
def report_until_cancelled(swallow: bool) -> str:
    """Report progress until the task is cancelled."""
    deadline = time.monotonic() + LIMIT
    try:
        while time.monotonic() < deadline:
            report_progress(1)
            time.sleep(0.01)
    except TaskCancelled:
        if not swallow:
            raise
    return "swallowed"


@pytest.mark.parametrize("swallow", [False, True])
def test_timeout_of_a_task_in_a_thread(swallow: bool, caplog: pytest.LogCaptureFixture) -> None:
    """A task in a thread that reports progress is cancelled, and fails with TaskTimeout."""
    with settings_with(TIMEOUT=0.2), caplog.at_level(logging.WARNING):
        result = finished(report_until_cancelled.enqueue(swallow))
        wait_until_idle()
    [error] = result.errors
    assert error.exception_class_path == "django_tasks_local.exceptions.TaskTimeout"
    assert "The task took longer than 0.2 seconds." in error.traceback
    warning = f"Task id={result.id} path={result.task.module_path} takes longer"
    wait_until(lambda: warning in caplog.text, "no warning names the task")


def test_timeout_of_a_coroutine_in_a_thread() -> None:
    with settings_with(TIMEOUT=0.2):
        result = finished(tasks.sleep_until_cancelled.enqueue("timeout"))
    assert result.errors[0].exception_class_path == "django_tasks_local.exceptions.TaskTimeout"


@task
def sleep(seconds: float) -> str:
    """Sleep without a report, so that a thread cannot be interrupted."""
    time.sleep(seconds)
    return "slept"


def test_a_task_in_a_thread_that_does_not_notice_its_timeout_succeeds() -> None:
    with settings_with(TIMEOUT=0.1):
        result = finished(sleep.enqueue(0.5))
    assert (result.status, result.return_value) == ("SUCCESSFUL", "slept")


def test_a_task_that_ends_in_time_is_not_changed() -> None:
    with settings_with(TIMEOUT=LIMIT):
        assert finished(tasks.add.enqueue(1)).return_value == 2
        result = finished(tasks.fail.enqueue())
    assert result.errors[0].exception_class_path == "builtins.ValueError"
