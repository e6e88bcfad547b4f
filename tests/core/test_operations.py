"""cancel(), retry() and join() name tasks by one rule, for local and for other backends."""

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.tasks import TaskResult, TaskResultStatus, task_backends
from django.tasks.exceptions import InvalidTaskBackend, TaskResultDoesNotExist
from django.test import override_settings

from django_tasks_local import (
    acancel,
    ajoin,
    aretry,
    cancel,
    hub,
    join,
    operations,
    retry,
)
from django_tasks_local.events import TaskEvent
from django_tasks_local.lookup import newest_event
from django_tasks_local.pools import threads
from tests.project import tasks
from tests.support.backends import PROCESSES, THREADS, settings_with
from tests.support.factories import event, task_result
from tests.support.waiting import LIMIT, finished, running, wait_until

STORING = "tests.project.backends.StoringBackend"
DUMMY = "django.tasks.backends.dummy.DummyBackend"


@pytest.fixture(autouse=True)
def backends() -> Iterator[None]:
    settings = {
        "default": {"BACKEND": THREADS, "OPTIONS": {"MAX_WORKERS": 2}},
        "other": {"BACKEND": THREADS, "OPTIONS": {"MAX_WORKERS": 1}},
        "processes": {"BACKEND": PROCESSES, "OPTIONS": {"MAX_WORKERS": 1}},
        "storing": {"BACKEND": STORING},
        "dummy": {"BACKEND": DUMMY},
        "immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
    }
    with override_settings(TASKS=settings):
        yield


# One rule for ids

OPERATIONS: list[Callable[..., Any]] = [cancel, retry, join]
ASYNC_OPERATIONS: list[Callable[..., Any]] = [acancel, aretry, ajoin]


@pytest.mark.parametrize("name", [lambda r: r, lambda r: r.id, lambda r: uuid.UUID(r.id)])
@pytest.mark.parametrize("alias", ["default", "other"])
def test_result_str_and_uuid_name_a_task(name: Callable[[Any], Any], alias: str) -> None:
    """A TaskResult, its id as a str and as a UUID name the task, without an alias."""
    result = finished(tasks.add.using(backend=alias).enqueue(1, 2))
    named = name(result)
    assert cancel(named) is False
    assert join(named).return_value == 3
    assert hub.snapshot(named).id == result.id
    again = finished(retry(named))
    assert (again.return_value, again.backend) == (3, alias)
    backend: Any = task_backends[alias]
    assert backend.get_result(named).id == result.id
    assert backend.cancel(named) is False
    with hub.subscribe(named) as subscription:
        assert [event.id for event in subscription.take(LIMIT)] == [result.id]


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("alias", [None, "default"])
def test_another_type_is_a_type_error_with_the_value(
    operation: Callable[..., Any], alias: str | None
) -> None:
    for value in (7, None, b"id", ["id"]):
        with pytest.raises(TypeError, match="is named by its TaskResult or by the id"):
            operation(value, backend=alias)
        with pytest.raises(TypeError, match="not by"):
            task_backends["default"].get_result(value)  # type: ignore[arg-type]


@pytest.mark.parametrize("operation", ASYNC_OPERATIONS)
async def test_another_type_is_a_type_error_in_async_code(operation: Callable[..., Any]) -> None:
    with pytest.raises(TypeError, match="not by 7"):
        await operation(7)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_unknown_id_lists_the_aliases(operation: Callable[..., Any]) -> None:
    """The error for an id that no local backend knows lists these backends and no others."""
    with pytest.raises(TaskResultDoesNotExist) as raised:
        operation("nothing")
    assert "(searched: 'default', 'other', 'processes')" in str(raised.value)
    with pytest.raises(TaskResultDoesNotExist, match="'other' has no result 'nothing'"):
        operation("nothing", backend="other")
    with pytest.raises(InvalidTaskBackend):
        operation("nothing", backend="nowhere")


@override_settings(TASKS={"default": {"BACKEND": DUMMY}})
def test_unknown_id_without_local_backends() -> None:
    with pytest.raises(TaskResultDoesNotExist, match="searched: none"):
        cancel("nothing")


@pytest.mark.parametrize("operation", OPERATIONS)
def test_id_of_two_backends_is_ambiguous(
    operation: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id that two backends know is a ValueError with both aliases; a TaskResult is not."""
    monkeypatch.setattr(threads, "new_id", lambda: "1")
    first = finished_as(tasks.add.enqueue(1, 1), "default")
    second = finished_as(tasks.add.using(backend="other").enqueue(2, 2), "other")
    with pytest.raises(ValueError, match="'default' and 'other'"):
        operation("1")
    with pytest.raises(ValueError, match="'default' and 'other'"):
        hub.snapshot("1")
    assert (join(first).return_value, join(second).return_value) == (2, 4)
    assert join("1", backend="other").return_value == 4
    assert hub.snapshot("1", "other").return_value == 4


def finished_as(result: Any, alias: str) -> Any:
    """Wait for a task whose id another backend uses too."""
    return join(result.id, LIMIT, backend=alias)


@pytest.mark.parametrize("operation", [*OPERATIONS, hub.snapshot])
def test_result_of_another_backend_than_the_named_one(operation: Callable[..., Any]) -> None:
    result = finished(tasks.noop.enqueue())
    with pytest.raises(ValueError, match="belongs to the task backend 'default', not to 'other'"):
        operation(result, backend="other")


# cancel()


def test_cancel_in_a_backend_that_cannot() -> None:
    result = tasks.noop.using(backend="dummy").enqueue()
    for arguments in ((result,), (result.id, "dummy")):
        with pytest.raises(NotImplementedError, match=r"'dummy' .*DummyBackend.* cannot cancel"):
            cancel(*arguments)


async def test_acancel() -> None:
    with settings_with(MAX_WORKERS=1):
        name = uuid.uuid4().hex
        result = await sync_to_async(running)(tasks.until_cancelled.enqueue(name))
        assert await acancel(result) is True
        assert (await ajoin(result, LIMIT)).errors[0].exception_class.__name__ == "TaskCancelled"
        assert await acancel(result.id) is False
        with pytest.raises(TaskResultDoesNotExist):
            await acancel("nothing")


# retry()


@pytest.mark.parametrize("alias", ["default", "processes"])
def test_retry_repeats_task_and_arguments(alias: str) -> None:
    """A retried task has the same function, arguments and backend, and a new id."""
    result = finished(tasks.echo.using(backend=alias).enqueue(1, [2], three={"four": 4}))
    again = retry(result)
    assert again.id != result.id
    assert finished(again).return_value == result.return_value
    assert (again.task, again.args, again.kwargs) == (result.task, result.args, result.kwargs)
    assert again.attempts == 1


def test_all_events_of_a_retried_task_have_retried_from() -> None:
    events: list[TaskEvent] = []
    with hub.recording(events.append):
        result = finished(tasks.steps.enqueue(3))
        again = finished(retry(result))
        third = finished(retry(again))
    retried_from = {result.id: None, again.id: result.id, third.id: again.id}
    assert {event.kind for event in events if event.id == third.id} == {
        "enqueued",
        "started",
        "progress",
        "finished",
    }
    assert [event.retried_from for event in events] == [retried_from[event.id] for event in events]


@pytest.mark.parametrize("alias", ["default", "processes", "storing"])
def test_last_event_of_a_retried_task_has_retried_from(alias: str) -> None:
    result = join(tasks.add.using(backend=alias).enqueue(1, 2))
    again = join(retry(result))
    assert hub.snapshot(again).retried_from == result.id
    assert hub.snapshot(again).return_value == 3
    assert hub.snapshot(result).retried_from is None


def test_task_that_a_retried_immediate_task_enqueues() -> None:
    """The events of a task that the retried task itself enqueues have no `retried_from`."""
    result = tasks.enqueue_noop.using(backend="storing").enqueue("storing")
    again = retry(result)
    assert hub.snapshot(again).retried_from == result.id
    assert hub.snapshot(again.return_value, "storing").retried_from is None


def test_newest_event_of_a_retried_task_of_another_process() -> None:
    """An event that is made from the stored result keeps the `retried_from` of the hub's event."""
    hub.publish(event("2", 1, "enqueued", backend="dummy", retried_from="1"))
    result = replace(task_result(), id="2", backend="dummy", status=TaskResultStatus.RUNNING)
    newest = newest_event(result)
    assert (newest.kind, newest.retried_from) == ("started", "1")


def test_retry_of_an_unfinished_task(gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    with pytest.raises(ValueError, match=f"id={result.id} .*has not finished.*RUNNING"):
        retry(result)
    dummy = tasks.noop.using(backend="dummy").enqueue()
    with pytest.raises(ValueError, match="its status is READY"):
        retry(dummy)


def test_retry_of_an_evicted_result() -> None:
    with settings_with(MAX_RESULTS=1, MAX_WORKERS=1):
        result = finished(tasks.noop.enqueue())
        finished(tasks.noop.enqueue())
        wait_until(lambda: hub.snapshot(result) is None, "the result is kept")
        for named in (result, result.id):
            with pytest.raises(TaskResultDoesNotExist):
                retry(named)


def test_retry_in_a_backend_without_results() -> None:
    result = tasks.noop.using(backend="immediate").enqueue()
    with pytest.raises(NotImplementedError):
        retry(result)


async def test_aretry() -> None:
    result = await ajoin(tasks.add.enqueue(1, 2), LIMIT)
    again = await aretry(result.id)
    assert (await ajoin(again, LIMIT)).return_value == 3
    assert hub.snapshot(again).retried_from == result.id


# join()


@pytest.mark.parametrize("alias", ["default", "processes"])
def test_join_returns_the_refreshed_result(alias: str) -> None:
    result = tasks.add.using(backend=alias).enqueue(1, 2)
    joined = join(result, LIMIT)
    assert (joined.status, joined.return_value) == (TaskResultStatus.SUCCESSFUL, 3)
    assert result.status == TaskResultStatus.READY
    assert join(joined, 0) is joined
    assert join(result, 0).return_value == 3


def test_join_waits_for_a_running_task(gate: str) -> None:
    result = running(tasks.gated.enqueue(gate))
    joined: list[Any] = []
    thread = threading.Thread(target=lambda: joined.append(join(result)))
    thread.start()
    wait_until(lambda: hub.statistics().subscriptions, "join() does not wait")
    tasks.gates[gate].set()
    thread.join(LIMIT)
    assert joined[0].return_value == gate


@pytest.mark.parametrize("timeout", [0, 0.01, -1])
def test_join_raises_timeout_error(gate: str, timeout: float) -> None:
    result = running(tasks.gated.enqueue(gate))
    expected = f"id={result.id} .*gated has not finished after {timeout} seconds.*RUNNING"
    with pytest.raises(TimeoutError, match=expected):
        join(result, timeout)
    dummy = tasks.noop.using(backend="dummy").enqueue()
    with pytest.raises(TimeoutError, match="its status is READY"):
        join(dummy, timeout)


async def test_ajoin_raises_timeout_error(gate: str) -> None:
    result = await sync_to_async(running)(tasks.gated.enqueue(gate))
    with pytest.raises(TimeoutError, match=r"after 0\.01 seconds"):
        await ajoin(result, 0.01)
    dummy = tasks.noop.using(backend="dummy").enqueue()
    with pytest.raises(TimeoutError, match=r"after 0\.01 seconds"):
        await ajoin(dummy, 0.01)
    waiting = asyncio.ensure_future(ajoin(result))
    await asyncio.sleep(0)
    tasks.gates[gate].set()
    assert (await waiting).return_value == gate


async def test_join_in_an_event_loop() -> None:
    result = tasks.noop.enqueue()
    with pytest.raises(RuntimeError, match=r"await ajoin\("):
        join(result)
    assert (await sync_to_async(join)(result)).is_finished


def test_join_of_a_result_that_is_evicted_when_it_has_finished(
    gate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """join() returns the result even if later results evict it before join() reads it."""
    with settings_with(MAX_RESULTS=1, MAX_WORKERS=1):
        result = running(tasks.gated.enqueue(gate))
        other = tasks.noop.enqueue()

        class LateSubscription(nullcontext[Any]):
            ended = False

            def __enter__(self) -> Any:
                return self

            def take(self, timeout: float | None) -> list[TaskEvent]:
                monkeypatch.undo()
                tasks.gates[gate].set()
                finished(other)
                wait_until(lambda: hub.snapshot(result) is None, "the result is kept")
                return []

        monkeypatch.setattr(hub, "subscribe", lambda *results: LateSubscription())
        assert join(result).return_value == gate


def test_join_in_a_backend_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """join() reads the result again until it is finished, in pauses of growing length."""
    pauses: list[float] = []
    monkeypatch.setattr(operations.time, "sleep", pauses.append)
    result = tasks.add.using(backend="storing").enqueue(1, 2)
    backend: Any = task_backends["storing"]
    unfinished = replace(result, status=TaskResultStatus.RUNNING)
    backend.unfinished = [unfinished] * 8
    assert join(result.id, backend="storing").return_value == 3
    assert pauses == [0.05, 0.1, 0.2, 0.4, 0.8, 1, 1, 1]


async def test_ajoin_in_a_backend_of_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "FIRST_PAUSE", 0.001)
    result = tasks.add.using(backend="storing").enqueue(1, 2)
    backend: Any = task_backends["storing"]
    backend.unfinished = [replace(result, status=TaskResultStatus.RUNNING)] * 3
    assert (await ajoin(result.id, backend="storing")).return_value == 3


def test_join_of_an_immediate_task() -> None:
    """A finished TaskResult is returned also if its backend stores no results, as in tests."""
    result = tasks.add.using(backend="immediate").enqueue(1, 2)
    assert join(result) is result


@pytest.mark.parametrize("task", [tasks.join_task, tasks.ajoin_task])
def test_join_of_a_task_of_its_own_pool_warns(task: Any) -> None:
    """A task that waits for a task of its own backend gets one RuntimeWarning that names it."""
    inner = finished(tasks.noop.enqueue())
    result = finished(task.enqueue(inner.id))
    [message] = result.return_value
    assert "waits for another task of its own backend 'default'" in message
    assert finished(task.using(backend="other").enqueue(inner.id)).return_value == []


def test_task_result_type_is_plain() -> None:
    """The operations return instances of Django's own TaskResult."""
    assert type(join(retry(join(tasks.noop.enqueue())))) is TaskResult
