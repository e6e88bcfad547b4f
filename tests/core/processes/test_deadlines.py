"""Each state of a worker process has a deadline, and the worker's own clock decides on TIMEOUT."""

import logging
import os
import signal
import time
from collections.abc import Iterator

import pytest

from django_tasks_local.exceptions import TaskTimeout
from django_tasks_local.processes import worker_process
from django_tasks_local.processes.deadlines import act_on_deadline
from django_tasks_local.processes.worker_process import (
    ACKNOWLEDGE_SECONDS,
    FALLBACK_SECONDS,
    IMPORT_WARNING_SECONDS,
)
from django_tasks_local.processes.worker_state import START_SECONDS, START_WARNING_SECONDS, State
from django_tasks_local.testing import wait_until_idle
from tests.project import process_tasks, slow_import
from tests.support.backends import settings_with
from tests.support.fake_worker import FakeWorker, new_task
from tests.support.systems import needs_stop_signal
from tests.support.waiting import finished, running, wait_until


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    made = FakeWorker()
    yield made
    made.close()


def expire(worker: FakeWorker, seconds: float) -> None:
    """Move the clock to the worker's deadline, which must be in so many seconds, and act on it."""
    assert not worker.parent.has_expired(worker.now + seconds - 0.1)
    worker.now += seconds
    assert worker.parent.has_expired(worker.now)
    act_on_deadline(worker.parent, timeout=2.0)


def test_slow_start_is_logged_and_then_ended(
    worker: FakeWorker, caplog: pytest.LogCaptureFixture
) -> None:
    """A worker that hangs in AppConfig.ready() counts as a failed start after 300 seconds."""
    expire(worker, START_WARNING_SECONDS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert worker.process.calls == []
    expire(worker, START_SECONDS - START_WARNING_SECONDS)
    assert worker.process.calls == ["kill"]
    assert worker.parent.never_became_ready()
    assert worker.parent.start_error == "fake@1 was not ready after 300 seconds."


def test_worker_that_does_not_read_its_task_is_killed(worker: FakeWorker) -> None:
    """The worker gets no SIGTERM, because after SIGTERM it could still begin the task."""
    worker.parent.become_ready()
    assert worker.parent.give([new_task()])
    expire(worker, ACKNOWLEDGE_SECONDS)
    assert worker.process.calls == ["kill"]
    assert worker.parent.state is State.ENDING
    assert worker.parent.reason is None


def test_slow_import_is_logged_once(worker: FakeWorker, caplog: pytest.LogCaptureFixture) -> None:
    worker.parent.become_ready()
    assert worker.parent.give([new_task()])
    worker.parent.acknowledge_first()
    expire(worker, IMPORT_WARNING_SECONDS)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert worker.process.calls == []
    assert worker.parent.deadline is None


def test_next_task_must_be_acknowledged_too(worker: FakeWorker) -> None:
    worker.parent.become_ready()
    assert worker.parent.give([new_task()])
    worker.parent.start_first(None)
    assert worker.parent.deadline is None
    worker.parent.tasks.append(new_task("next"))
    worker.parent.end_first()
    expire(worker, ACKNOWLEDGE_SECONDS)
    assert worker.process.calls == ["kill"]


def test_parent_stops_a_task_only_long_after_timeout(worker: FakeWorker) -> None:
    """Work that ends in time by the worker's clock is no TaskTimeout because of a late parent."""
    worker.parent.become_ready()
    assert worker.parent.give([new_task()])
    worker.parent.start_first(2.0)
    expire(worker, 2.0 + FALLBACK_SECONDS)
    assert isinstance(worker.parent.reason, TaskTimeout)
    assert worker.process.calls == ["terminate"]


def test_import_of_the_tasks_module_is_not_counted_as_its_time() -> None:
    """Heavy imports in a new worker do not make its first task exceed TIMEOUT."""
    with settings_with(MAX_WORKERS=1, TIMEOUT=1):
        result = finished(slow_import.noop.using(backend="processes").enqueue())
        assert result.errors == []


@needs_stop_signal
def test_time_in_which_a_worker_is_stopped_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A task that a debugger or a paused container suspends does not exceed TIMEOUT."""
    monkeypatch.setattr(worker_process, "FALLBACK_SECONDS", 600.0)
    with settings_with(MAX_WORKERS=1, TIMEOUT=1.5):
        result = running(process_tasks.sleep_in_steps.using(backend="processes").enqueue(10, 0.05))
        pid = int(result.worker_ids[-1].partition("@")[2])
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2.5)  # The time that passes is the subject of this test.
        os.kill(pid, signal.SIGCONT)
        assert finished(result).errors == []


@needs_stop_signal
def test_task_of_a_stopped_worker_runs_in_another_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that was sent to a worker that does not read does not wait without end."""
    with settings_with(MAX_WORKERS=1):
        first = finished(process_tasks.whoami.using(backend="processes").enqueue())
        wait_until_idle("processes")
        monkeypatch.setattr(worker_process, "ACKNOWLEDGE_SECONDS", 2.0)
        pid = int(first.worker_ids[-1].partition("@")[2])
        os.kill(pid, signal.SIGSTOP)
        with caplog.at_level(logging.WARNING):
            second = finished(process_tasks.whoami.using(backend="processes").enqueue())
            warning = f"does not read task id={second.id}"
            wait_until(lambda: warning in caplog.text, "no warning names the task")
        assert second.errors == []
        assert second.worker_ids != first.worker_ids
