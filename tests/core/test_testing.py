"""Tests of django_tasks_local.testing, whose helpers applications use in their own tests."""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.tasks import TaskResultStatus, task_backends
from django.tasks.exceptions import InvalidTask
from django.tasks.signals import task_finished
from django.test import SimpleTestCase, TestCase, TransactionTestCase, override_settings

from django_tasks_local import ThreadPoolBackend, foreign
from django_tasks_local.events import Progress, TaskEvent
from django_tasks_local.hub import hub
from django_tasks_local.testing import (
    collect_progress,
    idle_tasks,  # noqa: F401 - a fixture
    immediate_tasks,  # noqa: F401 - a fixture
    run_immediately,
    task_progress,  # noqa: F401 - a fixture
    wait_until_idle,
)
from tests.project import tasks
from tests.support.backends import PROCESSES, THREADS, settings_with
from tests.support.factories import event
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT, running


@pytest.fixture(scope="module", autouse=True)
def all_backends() -> Iterator[None]:
    """Configure backends that publish each progress report as an event of its own."""
    with settings_with(PROGRESS_INTERVAL=0):
        yield


def currents(events: list[TaskEvent]) -> list[Any]:
    return [event.progress.current for event in events]


# wait_until_idle()


def test_wait_until_idle(alias: str) -> None:
    results = [tasks.add.using(backend=alias).enqueue(number) for number in range(20)]
    wait_until_idle(alias, timeout=LIMIT)
    for result in results:
        result.refresh()
        assert result.status == TaskResultStatus.SUCCESSFUL
    wait_until_idle(alias, timeout=0)


def test_wait_includes_tasks_enqueued_by_receivers(alias: str) -> None:
    results = []
    numbers = iter(range(3))  # Receivers run in several threads concurrently.

    def enqueue_next(**kwargs: Any) -> None:
        if next(numbers, None) is not None:
            results.append(tasks.noop.using(backend=alias).enqueue())

    task_finished.connect(enqueue_next)
    try:
        tasks.noop.using(backend=alias).enqueue()
        wait_until_idle(alias, timeout=LIMIT)
    finally:
        task_finished.disconnect(enqueue_next)
    assert len(results) == 3
    for result in results:
        result.refresh()
        assert result.is_finished


def test_timeout_names_unfinished_tasks(alias: str, gate: str) -> None:
    with settings_with(MAX_WORKERS=1):
        busy = running(tasks.gated.using(backend=alias).enqueue(gate))
        waiting = tasks.noop.using(backend=alias).enqueue()
        with pytest.raises(TimeoutError) as caught:
            wait_until_idle(alias, timeout=0.01)
        assert str(caught.value) == (
            f"The task backend '{alias}' is not idle after 0.01 seconds. Unfinished: "
            f"{busy.id} (tests.project.tasks.gated, RUNNING), "
            f"{waiting.id} (tests.project.tasks.noop, READY)."
        )
        wait_until_idle("immediate", timeout=0)  # Tasks of other backends do not delay the call.
        tasks.gates[gate].set()
        wait_until_idle(alias, timeout=1000)  # returns when the last task ends


def test_timeout_names_task_whose_receivers_still_run() -> None:
    received, released = threading.Event(), threading.Event()

    def receive(**kwargs: Any) -> None:
        received.set()
        released.wait(LIMIT)

    task_finished.connect(receive)
    try:
        result = tasks.noop.enqueue()
        assert received.wait(LIMIT)
        with pytest.raises(TimeoutError, match=rf"{result.id} \(.*noop, SUCCESSFUL\)"):
            wait_until_idle(timeout=0.01)
        released.set()
        wait_until_idle(timeout=LIMIT)
    finally:
        released.set()
        task_finished.disconnect(receive)


async def test_wait_in_event_loop(alias: str) -> None:
    result = await tasks.add.using(backend=alias).aenqueue(1)
    await asyncio.to_thread(wait_until_idle, alias, LIMIT)
    await result.arefresh()
    assert result.return_value == 2


def test_wait_for_unsupported_backend() -> None:
    dummy = {"default": {"BACKEND": "django.tasks.backends.dummy.DummyBackend"}}
    with (
        SimpleTestCase().settings(TASKS=dummy),
        pytest.raises(NotImplementedError, match=r"'default' \(DummyBackend\) cannot tell"),
    ):
        wait_until_idle()


# collect_progress()


def test_collect_progress(alias: str) -> None:
    with collect_progress() as events:
        results = [tasks.steps.using(backend=alias).enqueue(100) for _ in range(2)]
        wait_until_idle(alias, timeout=LIMIT)
    for result in results:
        own = [event for event in events if event.id == result.id]
        assert currents(own) == list(range(1, 101))
        assert [event.sequence for event in own] == list(range(3, 103))
        assert {event.kind for event in own} == {"progress"}
    tasks.steps.using(backend=alias).enqueue(1)
    wait_until_idle(alias, timeout=LIMIT)
    assert len(events) == 200, "events after the block were collected"
    assert not hub.recorders


def test_collect_progress_of_some_tasks(alias: str, gate: str) -> None:
    steps = tasks.steps.using(backend=alias)
    watched = running(tasks.report.using(backend=alias).enqueue([7], {}, gate))
    with collect_progress(steps, watched) as events, collect_progress() as everything:
        steps.enqueue(2)
        tasks.tracked.using(backend=alias).enqueue(2)
        tasks.gates[gate].set()
        wait_until_idle(alias, timeout=LIMIT)
    assert {event.name for event in events} == {"steps", "report"}
    assert {event.name for event in everything} == {"steps", "report", "tracked"}
    assert sorted(currents(events)) == [1, 2, 7]


def test_collect_progress_of_a_result_whose_id_another_backend_uses() -> None:
    """collect_progress() collects no event of a task with the same id in another backend."""
    result = tasks.noop.enqueue()
    wait_until_idle(timeout=LIMIT)
    with collect_progress(result) as events:
        hub.publish(event(result.id, 3, backend="elsewhere", progress=Progress(current=1)))
    assert events == []


@pytest.mark.parametrize("backend", ["threads", "immediate"])
def test_throttled_last_report_is_collected(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(foreign, "PROGRESS_INTERVAL", LIMIT)
    with settings_with(PROGRESS_INTERVAL=LIMIT), collect_progress() as events:
        tasks.steps.using(backend=backend).enqueue(3)
        wait_until_idle(backend, timeout=LIMIT)
    assert currents(events) == [1, 3]
    assert [event.kind for event in events] == ["progress", "finished"]
    assert events[-1].progress.message == "step 3"


# The helpers as pytest fixtures and in test cases of unittest


@pytest.mark.usefixtures("idle_tasks")
def test_fixtures(alias: str, task_progress: list[TaskEvent]) -> None:  # noqa: F811
    tasks.steps.using(backend=alias).enqueue(1)
    wait_until_idle(alias, timeout=LIMIT)
    assert currents(task_progress) == [1]


def test_pytest_plugin(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["django_tasks_local.testing"]\n')
    (tmp_path / "test_some.py").write_text("""
import threading
from django.tasks import task

started, opened = threading.Event(), threading.Event()

@task
def wait():
    started.set()
    opened.wait(20)

def test_that_passes(idle_tasks, task_progress):
    assert task_progress == []

def test_that_leaves_a_task(monkeypatch, idle_tasks):
    monkeypatch.setattr("django_tasks_local.testing.wait_until_idle.__defaults__", ("default", 0))
    wait.enqueue()
    assert started.wait(20)

def test_that_opens():
    opened.set()
""")
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-W", "error", "--ds=tests.project.settings"),
            *(f"-pno:{plugin}" for plugin in ("asyncio", "cacheprovider", "xdist")),
        ],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "3 passed, 1 error" in done.stdout, done.stdout + done.stderr
    assert "(test_some.wait, RUNNING)" in done.stdout


def test_import_without_pytest() -> None:
    code = """
import sys
sys.modules["pytest"] = None
from django_tasks_local import testing
assert testing.wait_until_idle and not hasattr(testing, "idle_tasks")
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=60)


@pytest.mark.django_db
def test_rows_of_tasks_leak_out_of_a_test_case(alias: str) -> None:
    """wait_until_idle() warns in a transaction of a test, whatever the tasks do."""
    tasks.noop.using(backend=alias).enqueue()
    with pytest.warns(RuntimeWarning, match="the rows that they write remain") as caught:
        wait_until_idle(alias, timeout=LIMIT)
    assert [warning.filename for warning in caught] == [__file__]
    wait_until_idle("immediate")  # A task of this backend uses the connection of the test.


@pytest.mark.django_db
@pytest.mark.usefixtures("immediate_tasks")
def test_fixture_for_immediate_tasks(alias: str) -> None:
    get_user_model().objects.create(username="somebody")
    assert tasks.query.using(backend=alias).enqueue("a note").return_value == 1


def test_immediate_tasks_keep_aliases_and_queues() -> None:
    settings = {
        "default": {"BACKEND": THREADS, "QUEUES": ["mail"], "OPTIONS": {"MAX_WORKERS": 1}},
        "second": {"BACKEND": PROCESSES},
    }
    with override_settings(TASKS=settings):
        with run_immediately():
            for alias, queue in (("default", "mail"), ("second", "default")):
                task = tasks.add.using(backend=alias, queue_name=queue)
                assert task.enqueue(1).return_value == 2
            with pytest.raises(InvalidTask, match="Queue 'default' is not valid"):
                tasks.add.using(backend="default").enqueue(1)
        assert isinstance(task_backends["default"], ThreadPoolBackend)


class WithinTestCase(TestCase):
    """In a TestCase, run_immediately() runs the tasks in the transaction of the test."""

    def test_it(self) -> None:
        get_user_model().objects.create(username="somebody")
        with run_immediately(), collect_progress() as events:
            assert tasks.query.using(backend="processes").enqueue("a note").return_value == 1
            assert tasks.steps.enqueue(2).return_value == 2
            wait_until_idle(timeout=LIMIT)
        assert currents(events) == [1, 2]


class WithinTransactionTestCase(TransactionTestCase):
    """In a TransactionTestCase, a task on each backend sees the rows that the test has written."""

    def test_it(self) -> None:
        get_user_model().objects.create(username="somebody")
        for alias in ("threads", "processes", "immediate"):
            result = tasks.query.using(backend=alias).enqueue("a note")
            wait_until_idle(alias, timeout=LIMIT)
            if alias != "immediate":
                result.refresh()
            assert result.return_value == 1, alias
