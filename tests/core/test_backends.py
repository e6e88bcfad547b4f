"""Both backends fulfil the contract of django.tasks; their additions to it work as documented."""

import asyncio
import logging
import re
import threading
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.tasks import TaskResultStatus, default_task_backend, task_backends
from django.tasks.exceptions import (
    InvalidTask,
    TaskException,
    TaskResultDoesNotExist,
    TaskResultMismatch,
)
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.utils import timezone

import django_tasks_local
from django_tasks_local import ThreadPoolBackend, cancel, current_result_id, pools
from django_tasks_local.exceptions import QueueFull, ShuttingDown, TaskLost
from django_tasks_local.hub import hub
from django_tasks_local.pools import positions
from django_tasks_local.record import TaskRecord
from tests.project import tasks
from tests.support.backends import settings_with
from tests.support.waiting import LIMIT, AnyResult, finished, running, wait_for_event, wait_until

if TYPE_CHECKING:
    from django_tasks_local.events import TaskEvent


@pytest.fixture(scope="module", autouse=True)
def both_backends() -> Iterator[None]:
    """Configure a thread backend and a process backend for all tests that do not override TASKS."""
    with settings_with():
        yield


def run_task(task: Any, *args: Any, **kwargs: Any) -> AnyResult:
    return finished(task.enqueue(*args, **kwargs))


# The contract of django.tasks


def test_public_names() -> None:
    for name in django_tasks_local.__all__:
        assert hasattr(django_tasks_local, name)


def test_capabilities(alias: str) -> None:
    backend = task_backends[alias]
    assert not backend.supports_priority
    assert not backend.supports_defer
    assert backend.supports_get_result
    assert backend.supports_async_task


def test_enqueue_returns_a_snapshot(alias: str, gate: str) -> None:
    before = timezone.now()
    result = tasks.gated.using(backend=alias).enqueue(gate)
    assert result.status == TaskResultStatus.READY
    assert str(uuid.UUID(result.id, version=4)) == result.id
    assert before <= result.enqueued_at <= timezone.now()
    assert (result.args, result.kwargs, result.backend) == ([gate], {}, alias)
    assert result.started_at is result.finished_at is result.last_attempted_at is None
    assert (result.errors, result.worker_ids, result.attempts) == ([], [], 0)
    with pytest.raises(ValueError, match="has not finished"):
        _ = result.return_value

    running(result)
    assert result.status == TaskResultStatus.RUNNING
    assert result.enqueued_at <= result.started_at == result.last_attempted_at
    assert len(result.worker_ids) == result.attempts == 1
    assert not result.is_finished

    started_at = result.started_at
    tasks.gates[gate].set()
    finished(result)
    assert result.status == TaskResultStatus.SUCCESSFUL
    assert result.return_value == gate
    assert result.started_at == started_at <= result.finished_at
    assert result.errors == []


def test_get_result(alias: str) -> None:
    result = run_task(tasks.add.using(backend=alias), 1, b=2)
    assert task_backends[alias].get_result(result.id) == result
    assert tasks.add.using(backend=alias).get_result(result.id).return_value == 3
    assert task_backends[alias].get_result(uuid.UUID(result.id)) == result
    with pytest.raises(TaskResultMismatch):
        tasks.noop.using(backend=alias).get_result(result.id)


@pytest.mark.parametrize("result_id", ["", "no such id", "x" * 100_000])
def test_get_result_of_an_unknown_id(alias: str, result_id: str) -> None:
    with pytest.raises(TaskResultDoesNotExist, match="MAX_RESULTS"):
        task_backends[alias].get_result(result_id)


async def test_async_methods(alias: str) -> None:
    result = await tasks.add.using(backend=alias).aenqueue(2, b=2)
    async with hub.subscribe(result.id) as subscription:
        kinds = [event.kind async for event in subscription]
    assert kinds[-1] == "finished"
    await result.arefresh()
    assert (await task_backends[alias].aget_result(result.id)).return_value == 4
    with pytest.raises(TaskResultDoesNotExist):
        await task_backends[alias].aget_result("no such id")


def test_results_share_no_values(alias: str) -> None:
    result = run_task(tasks.echo.using(backend=alias), [1], key=[2])
    result.args.append("mine")
    result.kwargs.clear()
    result.worker_ids.clear()
    again = task_backends[alias].get_result(result.id)
    assert (again.args, again.kwargs, again.attempts) == ([[1]], {"key": [2]}, 1)


def test_task_cannot_change_its_arguments(alias: str) -> None:
    result = run_task(tasks.spoil.using(backend=alias), [1, 2])
    assert result.return_value == 0
    assert result.args == [[1, 2]]


def test_json_normalization(alias: str) -> None:
    result = run_task(tasks.echo.using(backend=alias), (1, b"two"), key={"a": ("b",)})
    assert result.args == [[1, "two"]]
    assert result.kwargs == {"key": {"a": ["b"]}}
    assert result.return_value == {"args": [[1, "two"]], "kwargs": {"key": {"a": ["b"]}}}


@pytest.mark.parametrize("argument", [object(), {1, 2}, {"key": timezone.now()}])
def test_arguments_that_are_not_json(alias: str, argument: Any) -> None:
    with pytest.raises(TypeError, match="Unsupported type"):
        tasks.echo.using(backend=alias).enqueue(argument)


@pytest.mark.parametrize(
    ("task", "error"),
    [(tasks.not_json, TypeError), (tasks.cyclic, RecursionError), (tasks.recurse, RecursionError)],
)
def test_return_values_that_are_not_json(alias: str, task: Any, error: type[Exception]) -> None:
    result = run_task(task.using(backend=alias))
    assert result.status == TaskResultStatus.FAILED
    assert result.errors[0].exception_class is error


@pytest.mark.parametrize("task", [tasks.fail, tasks.fail_async])
@pytest.mark.parametrize(
    ("kind", "path", "text"),
    [
        ("value", "builtins.ValueError", "bad value\nin two lines"),
        ("exit", "builtins.SystemExit", "SystemExit: 3"),
        ("interrupt", "builtins.KeyboardInterrupt", "KeyboardInterrupt"),
        ("generator", "builtins.GeneratorExit", "GeneratorExit"),
        ("unprintable", "tests.project.tasks.UnprintableError", "UnprintableError"),
        ("exiting", "tests.project.tasks.ExitingError", "<exception str() failed>"),
        ("demanding", "tests.project.tasks.DemandingError", "7: because"),
        ("group", "builtins.ExceptionGroup", "TypeError: two"),
        ("cancelled", "asyncio.exceptions.CancelledError", "CancelledError"),
    ],
)
def test_error_of_failed_task(alias: str, task: Any, kind: str, path: str, text: str) -> None:
    result = run_task(task.using(backend=alias), kind)
    assert result.status == TaskResultStatus.FAILED
    [error] = result.errors
    assert error.exception_class_path == path
    assert text in error.traceback
    assert "in fail" in error.traceback
    with pytest.raises(ValueError, match="Task failed"):
        _ = result.return_value


def test_system_exit_leaves_all_workers_alive(alias: str) -> None:
    with settings_with(MAX_WORKERS=3):
        results = [tasks.fail.using(backend=alias).enqueue("exit") for _ in range(9)]
        assert {finished(result).status for result in results} == {TaskResultStatus.FAILED}
        assert run_task(tasks.add.using(backend=alias), 1, 1).return_value == 2


def test_current_result_id(alias: str) -> None:
    for task in (tasks.result_id, tasks.async_result_id):
        result = run_task(task.using(backend=alias))
        assert result.return_value == result.id
    with pytest.raises(LookupError):
        current_result_id.get()


def test_takes_context(alias: str) -> None:
    result = run_task(tasks.with_context.using(backend=alias), 5)
    assert result.return_value == [1, result.id, "RUNNING", 5]
    result = run_task(tasks.async_with_context.using(backend=alias))
    assert result.return_value == result.id


def test_task_inside_a_task(alias: str) -> None:
    result = run_task(tasks.nested.using(backend=alias))
    assert result.return_value == result.id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"priority": 1}, "priority"),
        ({"run_after": timezone.now() + timedelta(hours=1)}, "run_after"),
        ({"queue_name": "other"}, "other"),
    ],
)
def test_unsupported_task_options(alias: str, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidTask, match=message):
        tasks.noop.using(backend=alias, **change)


# Signals and log records


class MaintainedBackend(ThreadPoolBackend):
    """A backend whose validate_task() rejects every task while `in_maintenance` is True."""

    in_maintenance = False

    def validate_task(self, task: Any) -> None:
        super().validate_task(task)
        if self.in_maintenance:
            raise InvalidTask("maintenance")


def test_subclass_validates_each_task() -> None:
    """
    Each enqueue() calls validate_task(), because a subclass may reject a task it once accepted.
    """
    backend = MaintainedBackend("default", {"BACKEND": "maintained"})
    backend.enqueue(tasks.noop, [], {})
    backend.in_maintenance = True
    with pytest.raises(InvalidTask, match="maintenance"):
        backend.enqueue(tasks.noop, [], {})
    assert backend.wait_until_idle(LIMIT) == []


def test_signals(alias: str, gate: str) -> None:
    seen: list[tuple[Any, ...]] = []

    def receive(signal: Any, sender: Any, task_result: Any, **kwargs: Any) -> None:
        seen.append((signal, sender, task_result.id, task_result.status))

    signals = (task_enqueued, task_started, task_finished)
    for signal in signals:
        signal.connect(receive)
    try:
        result = tasks.gated.using(backend=alias).enqueue(gate)
        assert seen[0] == (task_enqueued, type(task_backends[alias]), result.id, "READY")
        tasks.gates[gate].set()
        finished(result)
        wait_until(lambda: len(seen) == 3, "task_finished was not sent")
    finally:
        for signal in signals:
            signal.disconnect(receive)
    assert [entry[0] for entry in seen] == list(signals)
    assert {entry[1] for entry in seen} == {type(task_backends[alias])}
    assert {entry[2] for entry in seen} == {result.id}
    assert [entry[3] for entry in seen] == ["READY", "RUNNING", "SUCCESSFUL"]


@pytest.mark.parametrize("error", [ValueError, SystemExit])
@pytest.mark.parametrize("signal", [task_started, task_finished])
def test_receiver_that_raises(
    alias: str, signal: Any, error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    def receive(**kwargs: Any) -> None:
        raise error("from the receiver")

    signal.connect(receive)
    try:
        with settings_with(MAX_WORKERS=1):
            for _ in range(3):
                assert run_task(tasks.add.using(backend=alias), 1, 1).return_value == 2
            wait_until(lambda: len(error_records(caplog)) == 3, "the error was not logged")
    finally:
        signal.disconnect(receive)


def error_records(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return [
        record
        for record in caplog.records
        if record.exc_info and "from the receiver" in str(record.exc_info[1])
    ]


def test_receiver_of_task_enqueued_that_raises(alias: str) -> None:
    class Stop(BaseException):
        pass

    ids = []

    def receive(task_result: Any, **kwargs: Any) -> None:
        ids.append(task_result.id)
        raise Stop

    task_enqueued.connect(receive)
    try:
        with pytest.raises(Stop):
            tasks.add.using(backend=alias).enqueue(1)
    finally:
        task_enqueued.disconnect(receive)
    # enqueue() raised the receiver's exception after it had queued the task, so a worker runs the
    # task.
    assert finished(task_backends[alias].get_result(ids[0])).return_value == 2


async def test_async_receiver_in_event_loop(
    alias: str, gate: str, caplog: pytest.LogCaptureFixture
) -> None:
    """
    In an event loop, enqueue() cannot call an async receiver, so it logs that and queues the task.

    It raises no exception, because the task is already queued at that time.
    """
    seen = []

    async def receive(task_result: Any, **kwargs: Any) -> None:
        seen.append(task_result.id)

    task_enqueued.connect(receive)
    try:
        with settings_with(MAX_WORKERS=1):
            busy = await tasks.gated.using(backend=alias).aenqueue(gate)
            assert seen == [busy.id]
            waiting = tasks.noop.using(backend=alias).enqueue()
            assert waiting.status == TaskResultStatus.READY
            assert f"Not all receivers were called for task id={waiting.id}" in caplog.text
            tasks.gates[gate].set()
            await asyncio.to_thread(finished, waiting)
    finally:
        task_enqueued.disconnect(receive)
    assert waiting.status == TaskResultStatus.SUCCESSFUL
    assert seen == [busy.id]


def test_log_records(alias: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "django.tasks"):
        result = run_task(tasks.fail.using(backend=alias))
        wait_until(lambda: len(caplog.records) >= 3, "log records are missing")
    records = [record for record in caplog.records if record.name == "django.tasks"]
    assert [record.levelname for record in records] == ["DEBUG", "INFO", "ERROR"]
    assert all(result.id in record.getMessage() for record in records)
    exc_info = records[-1].exc_info
    assert exc_info is not None
    assert "bad value" in str(exc_info[1])


# Each process has one pool per alias


def test_one_pool_for_many_threads(alias: str, gate: str) -> None:
    with settings_with(MAX_WORKERS=4):
        barrier = threading.Barrier(8)
        results: list[AnyResult] = []

        def enqueue() -> None:
            barrier.wait(LIMIT)
            results.extend(tasks.add.using(backend=alias).enqueue(n) for n in range(50))

        threads = [threading.Thread(target=enqueue) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        values = sorted(finished(result).return_value for result in results)
        assert values == sorted(list(range(1, 51)) * 8)
        assert len({result.id for result in results}) == 400
        workers = {worker for result in results for worker in result.worker_ids}
        assert len(workers) <= 4
        assert len(task_threads(alias)) <= 4


def task_threads(alias: str) -> list[str]:
    """
    Return the names of the alias's worker threads; threads of an ending pool have the same names.
    """
    pattern = re.compile(rf"django-tasks-{alias}-\d+")
    names = [thread.name for thread in threading.enumerate() if pattern.fullmatch(thread.name)]
    return sorted(set(names))


def test_threads_start_as_needed_and_are_named(gate: str) -> None:
    with settings_with(MAX_WORKERS=3):
        results = [tasks.gated.enqueue(gate) for _ in range(5)]
        for result in results[:3]:
            running(result)
        for result in results[3:]:
            result.refresh()
            assert result.status == TaskResultStatus.READY
        assert {f"django-tasks-default-{n}" for n in range(3)} <= set(task_threads("default"))
        tasks.gates[gate].set()
        for result in results:
            finished(result)


async def test_backend_instances_share_their_pool(alias: str) -> None:
    result = await tasks.add.using(backend=alias).aenqueue(1)
    settings = task_backends.settings[alias]
    backend = type(task_backends[alias])(alias, dict(settings))
    async with hub.subscribe(result.id) as subscription:
        async for _ in subscription:
            pass
    assert backend.get_result(result.id).return_value == 2


def test_tasks_setting_changed(gate: str, caplog: pytest.LogCaptureFixture) -> None:
    with settings_with(MAX_WORKERS=1):
        busy = running(tasks.gated.enqueue(gate))
        waiting = tasks.noop.enqueue()
        with hub.subscribe(waiting.id) as subscription, settings_with(MAX_WORKERS=2):
            events = [event for event in subscription if event.is_last]
            assert events[0].error.reason == "lost"
            with pytest.raises(TaskResultDoesNotExist):
                default_task_backend.get_result(busy.id)
            assert run_task(tasks.add, 1).return_value == 2
    assert hub.snapshot(busy.id) is None
    messages = " ".join(record.getMessage() for record in caplog.records)
    assert busy.id in messages
    assert waiting.id in messages
    assert "tests.project.tasks.noop" in messages


# The OPTIONS of a backend


def test_max_results(alias: str) -> None:
    with settings_with(MAX_RESULTS=3, MAX_WORKERS=1):
        backend = task_backends[alias]
        results = [run_task(tasks.add.using(backend=alias), number) for number in range(5)]
        wait_until(lambda: hub.snapshot(results[1].id) is None, "the hub keeps an evicted task")
        for result in results[:2]:
            with pytest.raises(TaskResultDoesNotExist, match="MAX_RESULTS = 3"):
                backend.get_result(result.id)
        assert [backend.get_result(result.id).return_value for result in results[2:]] == [3, 4, 5]


def test_unfinished_results_are_not_evicted(alias: str, gate: str) -> None:
    with settings_with(MAX_RESULTS=1, MAX_WORKERS=2):
        result = running(tasks.gated.using(backend=alias).enqueue(gate))
        for number in range(5):
            run_task(tasks.add.using(backend=alias), number)
        result.refresh()
        assert result.status == TaskResultStatus.RUNNING
        tasks.gates[gate].set()
        assert finished(result).return_value == gate


def test_max_pending(alias: str, gate: str) -> None:
    with settings_with(MAX_PENDING=2, MAX_WORKERS=1):
        gated = tasks.gated.using(backend=alias)
        results = [gated.enqueue(gate) for _ in range(3)]
        running(results[0])
        with pytest.raises(QueueFull, match=r"gated was not enqueued.*MAX_PENDING"):
            gated.enqueue(gate)
        tasks.gates[gate].set()
        assert [finished(result).return_value for result in results] == [gate] * 3
        assert run_task(tasks.add.using(backend=alias), 1).return_value == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"MAX_WORKER": 3}, "unknown key 'MAX_WORKER'"),
        ({"max_workers": 3}, "unknown key 'max_workers'"),
        ({"START_METHOD": "spawn"}, "unknown key 'START_METHOD'"),
        ({"TIMEOUT": 0}, "must be None or a number of seconds above 0"),
        ({3: 3}, "unknown key 3"),
        ({"MAX_WORKERS": 0}, "must be a whole number, 1 or more, not 0"),
        ({"MAX_WORKERS": "4"}, "must be a whole number, 1 or more, not '4'"),
        ({"MAX_WORKERS": True}, "not True"),
        ({"MAX_RESULTS": -1}, "not -1"),
        ({"MAX_RESULTS": None}, "not None"),
        ({"MAX_PENDING": -1}, "must be None or a whole number, 0 or more, not -1"),
        ({"PROGRESS_INTERVAL": float("nan")}, "must be a number of seconds, 0 or more and at most"),
        ({"SHUTDOWN_TIMEOUT": 10**9}, "at most 100_000_000, not 1000000000"),
        ({"SHUTDOWN_TIMEOUT": -0.5}, "not -0.5"),
        ({"SHUTDOWN_TIMEOUT": float("inf")}, "not inf"),
        (["MAX_WORKERS"], "must be a dict"),
    ],
)
def test_invalid_options(options: Any, message: str) -> None:
    with pytest.raises(ImproperlyConfigured) as caught:
        ThreadPoolBackend("special", {"OPTIONS": options})
    assert message in str(caught.value)
    assert "TASKS['special']['OPTIONS']" in str(caught.value)
    if isinstance(options, dict):
        assert "MAX_PENDING, MAX_RESULTS, MAX_WORKERS, PROGRESS_INTERVAL" in str(caught.value)


def test_cancelled_task_evicted_before_its_turn(
    alias: str, gate: str, caplog: pytest.LogCaptureFixture
) -> None:
    with settings_with(MAX_RESULTS=1, MAX_WORKERS=1):
        busy = running(tasks.gated.using(backend=alias).enqueue(gate))
        waiting = [tasks.noop.using(backend=alias).enqueue() for _ in range(3)]
        for result in waiting:
            assert cancel(result.id, backend=alias)
        tasks.gates[gate].set()
        wait_until(
            lambda: hub.snapshot(waiting[-1].id) is None,
            "the hub keeps a task that should be evicted",
        )
        assert run_task(tasks.add.using(backend=alias), 1).return_value == 2
    assert busy.id
    assert not [record for record in caplog.records if record.levelname == "CRITICAL"]
    assert "KeyError" not in caplog.text


# Cancellation


def test_cancel_waiting_task(alias: str, gate: str) -> None:
    with settings_with(MAX_WORKERS=1):
        busy = running(tasks.gated.using(backend=alias).enqueue(gate))
        waiting = tasks.noop.using(backend=alias).enqueue()
        assert cancel(waiting.id, backend=alias)
        waiting.refresh()
        assert waiting.status == TaskResultStatus.FAILED
        assert waiting.errors[0].exception_class is django_tasks_local.exceptions.TaskCancelled
        assert waiting.started_at is None
        assert waiting.worker_ids == []
        assert not cancel(waiting.id, backend=alias)
        tasks.gates[gate].set()
        finished(busy)
        assert run_task(tasks.add.using(backend=alias), 1).return_value == 2
        waiting.refresh()
        assert waiting.attempts == 0


def test_cancelled_task_leaves_the_queue(alias: str, gate: str) -> None:
    """
    cancel() removes a waiting task from the queue, so that its arguments do not stay in memory.

    Neither MAX_PENDING nor MAX_RESULTS would limit the number of cancelled tasks in the queue.
    """

    def cancel_at_once(task_result: AnyResult, **kwargs: Any) -> None:
        if task_result.args == ["never"]:
            assert cancel(task_result.id, backend=alias)

    task_enqueued.connect(cancel_at_once)
    try:
        with settings_with(MAX_WORKERS=1):
            busy = running(tasks.gated.using(backend=alias).enqueue(gate))
            add = tasks.add.using(backend=alias)
            waiting = [add.enqueue(number) for number in range(10)]
            for result in [*waiting[1:5], *waiting[:4:-1]]:
                assert cancel(result.id, backend=alias)
            add.enqueue("never")
            queue = task_backends[alias]._pool.queue
            assert [record.id for record in queue] == [waiting[0].id]
            second = add.enqueue(2)
            assert positions_of([second]) == [1], "the first event has a wrong position"
            tasks.gates[gate].set()
            finished(busy)
            assert finished(waiting[0]).return_value == 1
            assert finished(second).return_value == 3
    finally:
        task_enqueued.disconnect(cancel_at_once)


def test_cancel_running_task(gate: str) -> None:
    result = running(tasks.until_cancelled.enqueue(gate))
    assert default_task_backend.cancel(result.id)
    finished(result)
    assert result.status == TaskResultStatus.FAILED
    assert result.errors[0].exception_class is django_tasks_local.exceptions.TaskCancelled
    assert tasks.notes[gate] == ["cleaned up"]
    event = hub.snapshot(result.id)
    assert event.error.reason == "cancelled"
    # report_progress() raises TaskCancelled only once, so the task could report during its cleanup.
    assert event.progress.message == "cleaning up"
    assert not cancel(result.id)


def test_task_may_swallow_the_cancellation(gate: str) -> None:
    result = running(tasks.until_cancelled.enqueue(gate, swallow=True))
    assert cancel(result.id)
    assert finished(result).return_value == "swallowed"


def test_cancel_tracked_loop(gate: str) -> None:
    result = tasks.tracked.enqueue(10, gate)
    wait_for_event(result.id, lambda e: e.progress and e.progress.message == "half-way")
    assert cancel(result.id)
    tasks.gates[gate].set()
    assert finished(result).status == TaskResultStatus.FAILED
    assert hub.snapshot(result.id).progress.current == 6


def test_cancel_coroutine(gate: str) -> None:
    result = running(tasks.sleep_until_cancelled.enqueue(gate))
    assert cancel(result.id)
    assert finished(result).status == TaskResultStatus.FAILED
    assert result.errors[0].exception_class is django_tasks_local.exceptions.TaskCancelled
    assert tasks.notes[gate] == ["cleaned up"]


def test_cancel_unknown_or_unsupported_task() -> None:
    with pytest.raises(TaskResultDoesNotExist):
        cancel("no such id")
    with pytest.raises(NotImplementedError, match=r"'immediate'.*cannot cancel"):
        cancel("any", backend="immediate")


# The position of a waiting task


@pytest.fixture
def quick_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(positions, "INTERVAL_SECONDS", 0.02)


def positions_of(results: list[AnyResult]) -> list[int | None]:
    return [hub.snapshot(result.id).position for result in results]


def wait_until_published() -> None:
    """Wait until no pool has a scan of its queue scheduled, so that all positions are published."""
    queues = [pool._positions for pool in pools._pools.values()]
    wait_until(
        lambda: not any(queue._is_scheduled for queue in queues), "scans of the queue do not end"
    )


@pytest.mark.usefixtures("quick_positions")
def test_positions(alias: str, gate: str, tmp_path: Path) -> None:
    gates = [gate, *(str(tmp_path / f"gate-{number}") for number in range(3))]
    tasks.gates.update({path: tasks.Gate(path) for path in gates[1:]})
    with settings_with(MAX_WORKERS=1):
        results = [tasks.gated.using(backend=alias).enqueue(path) for path in gates]
        running(results[0])
        wait_until(lambda: positions_of(results) == [None, 0, 1, 2], "the positions are wrong")
        with hub.subscribe(results[3].id) as subscription:
            wait_until_published()
            seen = subscription.take(LIMIT)
            tasks.gates[gates[0]].set()
            running(results[1])
            wait_until(
                lambda: positions_of(results) == [None, None, 0, 1], "the tasks did not move up"
            )
            wait_until_published()
            seen += subscription.take(LIMIT)
            assert cancel(results[2].id, backend=alias)
            wait_until(
                lambda: positions_of(results) == [None, None, None, 0], "the task did not move up"
            )
            seen += subscription.take(LIMIT)
            assert [(event.sequence, event.position) for event in seen] == [(1, 2), (1, 1), (1, 0)]
            tasks.gates[gates[1]].set()
            tasks.gates[gates[3]].set()
            assert {event.position for event in subscription} == {None}


@pytest.mark.usefixtures("quick_positions")
def test_positions_of_tasks_enqueued_by_many_threads(gate: str) -> None:
    with settings_with(MAX_WORKERS=1):
        busy = running(tasks.gated.enqueue(gate))
        results: list[AnyResult] = []

        def enqueue() -> None:
            results.extend(tasks.noop.enqueue() for _ in range(20))

        threads = [threading.Thread(target=enqueue) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
        for result in results[:50]:
            assert cancel(result.id)
        wait_until(
            lambda: max(positions_of(results[50:])) <= 49,
            "a task keeps a position that is too high",
        )
        tasks.gates[gate].set()
        finished(busy)
        assert {finished(result).attempts for result in results[50:]} == {1}


# Closing a backend or its pool


def test_close_loses_unfinished_tasks(gate: str, caplog: pytest.LogCaptureFixture) -> None:
    with settings_with(MAX_WORKERS=1, SHUTDOWN_TIMEOUT=0):
        busy = running(tasks.gated.enqueue(gate))
        waiting = [tasks.noop.enqueue() for _ in range(3)]
        default_task_backend.close()
        for result in (busy, *waiting):
            result.refresh()
            assert result.status == TaskResultStatus.FAILED
            assert result.errors[0].exception_class is django_tasks_local.exceptions.TaskLost
            assert hub.snapshot(result.id).error.reason == "lost"
        warnings = [record for record in caplog.records if record.levelname == "WARNING"]
        text = "\n".join(record.getMessage() for record in warnings)
        assert all(result.id in text for result in (busy, *waiting))
        assert "tests.project.tasks.gated" in text


@pytest.mark.parametrize("alias", ["threads", "processes"])
def test_closed_pool_is_replaced(alias: str) -> None:
    """After close() the next task gets new workers, and the results of earlier tasks remain."""
    with settings_with(MAX_WORKERS=1, MAX_RESULTS=2):
        backend: Any = task_backends[alias]
        results = []
        for number in range(3):
            backend.close()
            assert backend.statistics().workers == 0
            results.append(finished(tasks.add.using(backend=alias).enqueue(number)))
        assert [result.return_value for result in results] == [1, 2, 3]
        wait_until(lambda: backend.statistics().results == 2, "the limit holds no longer")
        with pytest.raises(TaskResultDoesNotExist):
            results[0].refresh()
        assert hub.snapshot(results[0]) is None
        assert backend.get_result(results[1].id).return_value == 2
        backend.close()
        assert [pool.alias for pool in pools.all_pools()].count(alias) == 1


def test_close_waits_for_running_task(gate: str) -> None:
    with settings_with(MAX_WORKERS=1):
        busy = running(tasks.gated.enqueue(gate))
        pool = default_task_backend._pool
        closing = threading.Thread(target=default_task_backend.close, args=(LIMIT,))
        closing.start()
        wait_until(lambda: pool._unfinished._waiters, "close() does not wait for the task")
        # TaskException is the base class of Django's own exceptions of tasks.
        assert issubclass(ShuttingDown, TaskException)
        assert issubclass(ShuttingDown, RuntimeError)
        with pytest.raises(ShuttingDown, match=r"'default' is shutting down; task .*noop was not"):
            tasks.noop.enqueue()
        tasks.gates[gate].set()
        closing.join(LIMIT)
        assert finished(busy).return_value == gate


def test_lost_task_is_cancelled() -> None:
    """
    close() cancels a running task that it reports as lost, because the process may continue to run.
    """
    name = uuid.uuid4().hex
    with settings_with(MAX_WORKERS=1):
        result = running(tasks.until_cancelled.enqueue(name))
        default_task_backend.close(timeout=0)  # type: ignore[attr-defined]
        wait_until(lambda: tasks.notes[name] == ["cleaned up"], "the task continues")
        assert finished(result).errors[0].exception_class is django_tasks_local.exceptions.TaskLost


def test_task_that_starts_while_pool_is_discarded(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    The late `started` event of a task that discard() has released must not re-create it in the hub.
    """
    with settings_with(MAX_WORKERS=1), hub.subscribe() as subscription:
        pool = task_backends["default"]._pool  # type: ignore[attr-defined]
        start = TaskRecord.start

        def start_then_discard(*args: Any) -> bool:
            started = start(*args)
            pool.discard()
            return started

        monkeypatch.setattr(TaskRecord, "start", start_then_discard)
        result = tasks.noop.enqueue()
        wait_until(lambda: not task_threads("default"), "the worker continues")
        events = [event for event in subscription.take(LIMIT) if event.id == result.id]
        assert [event.kind for event in events] == ["finished"]
        assert hub.snapshot(result.id) is None


def test_task_that_ends_while_pool_is_discarded(gate: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with settings_with(MAX_WORKERS=1):
        pool = task_backends["default"]._pool  # type: ignore[attr-defined]
        succeed = TaskRecord.succeed

        def succeed_then_discard(*args: Any) -> bool:
            succeeded = succeed(*args)
            if succeeded:
                pool.discard()
            return succeeded

        monkeypatch.setattr(TaskRecord, "succeed", succeed_then_discard)
        result = running(tasks.gated.enqueue(gate))
        with hub.subscribe(result.id) as subscription:
            tasks.gates[gate].set()
            assert [event.status for event in subscription if event.is_last] == ["SUCCESSFUL"]
        wait_until(lambda: hub.snapshot(result.id) is None, "the hub keeps a discarded task")


@pytest.mark.parametrize("step", ["add", "enqueue"])
def test_task_enqueued_while_another_thread_closes_the_pool(
    step: str, alias: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The task fails with TaskLost if the pool closes before it is stored or before it is published.
    """
    seen: list[TaskEvent] = []
    with settings_with(MAX_WORKERS=1), hub.recording(seen.append):
        pool = task_backends[alias]._pool  # type: ignore[attr-defined]
        patched = TaskRecord if step == "enqueue" else pool.results
        original = getattr(patched, step)

        def close_then(*args: Any) -> None:
            monkeypatch.undo()
            closing = threading.Thread(target=pool.refuse)
            closing.start()
            closing.join(LIMIT)
            original(*args)

        monkeypatch.setattr(patched, step, close_then)
        result = tasks.noop.using(backend=alias).enqueue()
        assert finished(result).errors[0].exception_class is TaskLost
        own = [event for event in seen if event.id == result.id]
        assert [event.kind for event in own] == ["enqueued", "finished"]
        assert pool.statistics().unfinished == 0
        assert pool.statistics().waiting == 0
