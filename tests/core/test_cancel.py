"""Cancelling at odd moments: there is one clear outcome, and the answer agrees with it."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from django.tasks import TaskResultStatus, task_backends
from django.tasks.exceptions import TaskResultDoesNotExist
from django.test import override_settings

from django_tasks_local import cancel
from django_tasks_local.hub import hub
from tests.project import tasks
from tests.support.waiting import finished, running, wait_for_event, wait_until

CANCELLED = "django_tasks_local.exceptions.TaskCancelled"
ALIASES = ["default", "processes"]


@pytest.fixture(autouse=True, scope="module")
def backends() -> Iterator[None]:
    settings = {
        "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
        "processes": {
            "BACKEND": "django_tasks_local.ProcessPoolBackend",
            "OPTIONS": {"MAX_WORKERS": 1},
        },
    }
    with override_settings(TASKS=settings):
        yield


def was_cancelled(result: Any) -> bool:
    """Whether a finished task was cancelled; its result and its last event must agree."""
    event = hub.snapshot(result.id)
    assert event is not None
    assert event.status == result.status
    if result.status == TaskResultStatus.SUCCESSFUL:
        assert not result.errors
        return False
    assert [error.exception_class_path for error in result.errors] == [CANCELLED]
    assert event.error is not None
    assert event.error.reason == "cancelled"
    return True


@pytest.mark.parametrize("alias", ALIASES)
def test_a_finished_task(alias: str) -> None:
    result = finished(tasks.noop.using(backend=alias).enqueue())
    assert cancel(result.id, alias) is False
    result.refresh()
    assert not was_cancelled(result)


@pytest.mark.parametrize("alias", ALIASES)
def test_an_unknown_id(alias: str) -> None:
    with pytest.raises(TaskResultDoesNotExist):
        cancel("nothing", alias)


def test_twice(tmp_path: Path) -> None:
    """Both say that the task was not finished, and it is told once."""
    result = running(tasks.until_cancelled.enqueue(str(tmp_path)))
    assert cancel(result.id) is True
    assert cancel(result.id) in {True, False}  # It may have ended in between.
    assert was_cancelled(finished(result))
    assert cancel(result.id) is False
    assert tasks.notes[str(tmp_path)] == ["tidied"]


@pytest.mark.parametrize("task", [tasks.tidy_up, tasks.tidy_up_async])
def test_again_while_it_tidies_up(task: Any, gate: str) -> None:
    """It is not interrupted there, however often somebody clicks."""
    result = running(task.enqueue(gate, gate))
    notes = tasks.notes[gate]
    assert cancel(result.id) is True
    wait_until(lambda: notes, "it is not cancelled")
    assert cancel(result.id) is True
    tasks.gates[gate].set()
    assert was_cancelled(finished(result))
    assert notes == ["tidying", "tidied"]


def test_a_coroutine_that_has_just_ended(gate: str) -> None:
    """Its thread has not, and is not interrupted: the task is one that has succeeded."""
    result = tasks.leave_a_query.enqueue(gate)
    wait_for_event(result.id, lambda e: e.progress and e.progress.message == "ending")
    assert cancel(result.id) is True
    tasks.gates[gate].set()
    assert finished(result).return_value == "value"
    assert not was_cancelled(result)


def test_by_many_at_once(gate: str) -> None:
    """A waiting task is cancelled by one of them, and all hear the truth."""
    blocked = [tasks.gated.enqueue(gate) for _ in range(10)]
    waiting = tasks.noop.enqueue()
    barrier = threading.Barrier(4)

    def race(_: int) -> bool:
        barrier.wait(tasks.LIMIT)
        return cancel(waiting.id)

    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(race, range(4)))
    assert any(answers)
    assert was_cancelled(finished(waiting))
    for result in blocked:
        cancel(result.id)
    tasks.gates[gate].set()


@pytest.mark.parametrize("alias", ALIASES)
def test_in_the_moment_of_finishing(alias: str) -> None:
    """
    Whatever comes first counts, and False is never said of a task that was cancelled.

    In a thread True may be said of a task that succeeds, because it reports no more.
    """
    # Each worker process that is stopped is replaced, which takes a while.
    times = 300 if alias == "default" else 8
    for number in range(times):
        result = tasks.steps.using(backend=alias).enqueue(number % 7)
        if number % 3:
            with hub.subscribe(result.id) as subscription:
                while not any(event.sequence > 1 for event in subscription.take(tasks.LIMIT)):
                    pass
        answer = cancel(result.id, alias)
        cancelled = was_cancelled(finished(result))
        assert answer or not cancelled
        assert cancel(result.id, alias) is False


def test_what_somebody_else_has_just_cancelled(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the result and the cancellation: the second one has cancelled nothing."""
    busy = [tasks.gated.enqueue(gate) for _ in range(10)]
    for result in busy:
        running(result)
    waiting = tasks.noop.enqueue()
    pool = task_backends["default"]._pool
    fail_waiting = pool.fail_waiting
    monkeypatch.setattr(pool, "fail_waiting", lambda *args: fail_waiting(*args) and False)
    assert cancel(waiting.id) is False
    assert was_cancelled(finished(waiting))
