"""ProcessPoolBackend: the lifecycle of tasks in worker processes, and the death of workers."""

import logging
import os
import pickle
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connection
from django.tasks import TaskResultStatus, task_backends
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.test import TransactionTestCase, override_settings

from django_tasks_local import cancel
from django_tasks_local.events import NO_VERSION, EventKind, Version
from django_tasks_local.hub import hub
from django_tasks_local.processes import starting, worker_process
from django_tasks_local.processes.assigning import Assigner
from django_tasks_local.processes.connection import WorkerConnection
from django_tasks_local.processes.pace import Pace
from django_tasks_local.processes.pool import ProcessPool
from django_tasks_local.processes.remote_errors import RemoteError
from django_tasks_local.processes.starting import Starter
from django_tasks_local.processes.task import ProcessTask
from django_tasks_local.processes.worker_process import WorkerProcess
from tests.project import process_tasks as tasks
from tests.support.systems import (
    is_alive,
    kill,
    needs_open_files,
    needs_stop_signal,
    needs_tickets,
)
from tests.support.waiting import LIMIT, AnyResult, finished, running, wait_for_event, wait_until

SUCCESSFUL, FAILED = TaskResultStatus.SUCCESSFUL, TaskResultStatus.FAILED
BACKEND = "django_tasks_local.ProcessPoolBackend"


def processes(**options: Any) -> Any:
    """Return settings with a process backend of these OPTIONS."""
    return override_settings(TASKS={"default": {"BACKEND": BACKEND, "OPTIONS": options}})


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    """Configure a process pool with two workers for all tests that do not override TASKS."""
    with processes(MAX_WORKERS=2):
        yield


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """Return the path of a FIFO; a task that reads it blocks until the test writes to it."""
    path = tmp_path / "gate"
    if hasattr(os, "mkfifo"):
        os.mkfifo(path)
    return path


def run_task(task: Any, *args: Any, **kwargs: Any) -> AnyResult:
    return finished(task.enqueue(*args, **kwargs))


def pool() -> ProcessPool:
    return task_backends["default"]._pool  # type: ignore[attr-defined, no-any-return]


def workers() -> list[WorkerProcess]:
    """Return the workers that the pool has now."""
    return pool().workers()


def starter() -> Starter:
    """Return the Starter of the pool's dispatcher."""
    dispatcher = pool().dispatcher
    assert dispatcher is not None
    return dispatcher.starter


def pid_of(result: AnyResult) -> int:
    return pid_in(result.worker_ids[0])


def pid_in(worker_id: str) -> int:
    return int(worker_id.rpartition("@")[2])


def error_of(result: AnyResult) -> tuple[str, str]:
    """Return the reason and the message of a failure, as streams send them."""
    event = hub.snapshot(result.id)
    assert result.status == FAILED
    assert event is not None
    assert event.is_last
    assert event.error is not None
    return str(event.error.reason), event.error.message


# The lifecycle of a task


def test_task_runs_in_another_process() -> None:
    result = run_task(tasks.whoami)
    pid, result_id, label = result.return_value
    assert result_id == result.id
    assert label == "auth.User"
    assert pid == pid_of(result) != os.getpid()
    assert result.enqueued_at <= result.started_at <= result.finished_at
    assert result.last_attempted_at == result.started_at
    assert result.attempts == 1


def test_coroutine() -> None:
    result = run_task(tasks.async_whoami)
    assert result.return_value == [pid_of(result), result.id]


def test_task_context() -> None:
    result = run_task(tasks.with_context, 7)
    times = [str(result.enqueued_at), str(result.started_at)]
    assert result.return_value == [result.id, "RUNNING", result.worker_ids, 1, *times, 7]


def test_fields_of_a_custom_task_class_reach_the_worker() -> None:
    """A project's Task class keeps the values of the fields that it adds to Django's Task."""
    result = run_task(replace(tasks.labels, label="blue", tags=["a", "b"]))
    assert result.return_value == ["LabelledTask", "blue", ["a", "b"]]


def test_status_is_running_only_in_a_worker(fifo: Path) -> None:
    first, second = tasks.gated.enqueue(str(fifo)), tasks.gated.enqueue(str(fifo))
    third = tasks.noop.enqueue()
    running(first)
    running(second)
    third.refresh()
    assert third.status == TaskResultStatus.READY
    assert cancel(third.id)
    assert error_of(finished(third))[0] == "cancelled"
    assert third.started_at is None
    cancel(second.id)
    finished(second)
    fifo.write_text("go", encoding="utf-8")
    assert finished(first).return_value == pid_of(first)


def test_signals_are_sent_in_this_process_in_order() -> None:
    seen: list[tuple[str, int, str]] = []

    def note(name: str) -> Any:
        return lambda sender, task_result, **kwargs: seen.append(
            (name, os.getpid(), str(task_result.status))
        )

    receivers = {"enqueued": task_enqueued, "started": task_started, "finished": task_finished}
    notes = {name: note(name) for name in receivers}
    for name, django_signal in receivers.items():
        django_signal.connect(notes[name])
    try:
        run_task(tasks.noop)
        wait_until(lambda: len(seen) == 3, "not all signals were sent")
    finally:
        for name, django_signal in receivers.items():
            django_signal.disconnect(notes[name])
    here = os.getpid()
    assert seen == [
        ("enqueued", here, "READY"),
        ("started", here, "RUNNING"),
        ("finished", here, "SUCCESSFUL"),
    ]


def test_progress_is_throttled_and_the_last_value_arrives(fifo: Path) -> None:
    result = tasks.burst.enqueue(1000, str(fifo))
    event = wait_for_event(result.id, lambda event: event.progress and event.progress.current > 999)
    assert event.progress is not None
    assert event.sequence < 100
    assert event.progress.percent == 100
    assert event.progress.rate
    fifo.write_text("go", encoding="utf-8")
    assert finished(result).status == SUCCESSFUL


def test_tracked_loop() -> None:
    result = run_task(tasks.tracked, 200_000)
    event = hub.snapshot(result.id)
    assert result.return_value == 200_000
    assert event is not None
    assert event.progress is not None
    assert (event.progress.current, event.progress.message) == (200_000, "counting")


def test_report_with_objects_kills_the_worker(fifo: Path) -> None:
    """A worker's message has plain values; the parent can import none of the classes."""
    result = tasks.report_objects.enqueue(str(fifo))
    event = wait_for_event(result.id, lambda event: event.progress and event.progress.data)
    progress = event.progress
    assert progress is not None
    assert (progress.current, progress.total, progress.percent) == (0, 2, 50.0)
    assert (progress.message, progress.unit) == ("text", "text")
    assert progress.data == {"text": "text", "number": 2.5}
    assert progress.levels == [
        {"message": "text", "current": 0, "total": 2, "unit": "text"},
        {"message": "text", "current": 2.5, "total": 2.5, "unit": "text"},
    ]
    fifo.write_text("go", encoding="utf-8")
    assert finished(result).return_value == "reported"
    assert "only_in_the_worker" not in sys.modules


def test_events_are_ordered() -> None:
    kinds = []
    with hub.subscribe() as subscription:
        result = tasks.storm.enqueue(20_000)
        done = False
        while not done:
            for event in subscription.take(LIMIT):
                if event.id == result.id:
                    kinds.append((event.sequence, event.kind))
                    done = event.is_last
    assert kinds == sorted(kinds)
    assert kinds[-1][1] is EventKind.FINISHED


# Errors in tasks, arguments and return values


def test_error_keeps_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "django.tasks"):
        result = run_task(tasks.fail, "value")
        # The handler of caplog adds a record before it writes the text.
        wait_until(lambda: "process_tasks.py" in caplog.text, "the child's traceback is not logged")
    error = result.errors[0]
    assert error.exception_class_path == "builtins.ValueError"
    assert "in fail" in error.traceback
    assert error_of(result) == ("failed", "bad value")
    assert caplog.records[0].exc_info is not None
    assert isinstance(caplog.records[0].exc_info[1], RemoteError)


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("exit", "builtins.SystemExit"),
        ("demanding", "tests.project.tasks.DemandingError"),
        ("unprintable", "tests.project.tasks.UnprintableError"),
        ("unpickleable", "builtins.RuntimeError"),
    ],
)
def test_unpickleable_errors(kind: str, path: str) -> None:
    result = run_task(tasks.fail, kind)
    assert result.errors[0].exception_class_path == path
    assert "in fail" in result.errors[0].traceback
    assert run_task(tasks.noop).worker_ids, "the worker has died"


def test_return_values_that_are_not_plain() -> None:
    """A string of a class that only the worker has arrives as str; an object fails its task."""
    assert run_task(tasks.unpickleable_value).return_value == "text"
    assert run_task(tasks.not_json).errors[0].exception_class_path == "builtins.TypeError"


@pytest.mark.parametrize("argument", [lambda: None, threading.Lock()])
def test_arguments_must_be_pickleable(argument: Any) -> None:
    before = pool().results.records()
    with pytest.raises(ValueError, match="pickleable"):
        tasks.length.enqueue(argument)
    assert pool().results.records() == before


def test_arguments_must_be_json() -> None:
    with pytest.raises(TypeError, match="Unsupported type"):
        tasks.length.enqueue(object())


class Text(str):
    """A string that cannot be pickled."""

    __slots__ = ()

    def __reduce__(self) -> Any:
        raise pickle.PicklingError("cannot be pickled")


def test_argument_of_a_class_that_cannot_be_pickled() -> None:
    """enqueue() makes a str of an instance of a subclass, as JSON does."""
    assert run_task(tasks.length, Text("text")).return_value == 4


def test_worker_cannot_enqueue() -> None:
    result = run_task(tasks.enqueue_another)
    assert error_of(result)[1].startswith("Task tests.project.process_tasks.noop was not enqueued")


# Stopping tasks and pools


@pytest.fixture
def long_kill_after(monkeypatch: pytest.MonkeyPatch) -> None:
    """
    Give a cancelled task LIMIT seconds to clean up, because KILL_AFTER is short on a busy machine.
    """
    monkeypatch.setattr(worker_process, "KILL_AFTER", LIMIT)


@pytest.mark.usefixtures("long_kill_after")
def test_cancelled_task_cleans_up(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for task in (tasks.until_cancelled, tasks.async_until_cancelled):
        marker.write_text("")
        result = running(task.enqueue(str(marker)))
        assert cancel(result.id)
        finished(result)
        assert error_of(result) == ("cancelled", "The task was cancelled.")
        assert marker.read_text() == "cleaned up"
        assert not cancel(result.id)


@pytest.mark.usefixtures("long_kill_after")
def test_task_may_swallow_its_cancellation(tmp_path: Path) -> None:
    result = running(tasks.until_cancelled.enqueue(str(tmp_path / "marker"), swallow=True))
    cancel(result.id)
    assert finished(result).return_value == "swallowed"


def test_cancelled_c_code_is_killed() -> None:
    result = running(tasks.run_c_code.enqueue())
    cancel(result.id)
    assert error_of(finished(result))[0] == "cancelled"
    wait_until(lambda: not is_alive(pid_of(result)), "the process does not end")


@pytest.mark.parametrize("task", [tasks.fork, tasks.fork_async])
def test_child_of_worker_dies_of_sigterm(task: Any) -> None:
    """
    SIGTERM kills a child that a task forks, because multiprocessing.Pool relies on this default.

    The worker's own SIGTERM handler must therefore not apply to its children.
    """
    assert run_task(task).return_value == signal.SIGTERM


def test_timeout(tmp_path: Path) -> None:
    with processes(MAX_WORKERS=1, TIMEOUT=2):
        result = run_task(tasks.until_cancelled, str(tmp_path / "marker"), swallow=True)
        assert error_of(result) == ("timeout", "The task took longer than 2 seconds.")
        assert result.errors[0].exception_class_path == "django_tasks_local.exceptions.TaskTimeout"
        assert run_task(tasks.noop).status == SUCCESSFUL


def test_max_tasks_per_worker() -> None:
    with processes(MAX_WORKERS=1, MAX_TASKS_PER_WORKER=2):
        pids = [run_task(tasks.whoami).return_value[0] for _ in range(5)]
    assert pids[0] == pids[1] != pids[2] == pids[3] != pids[4] != pids[0]


def test_idle_workers_stay_for_ever() -> None:
    """With IDLE_TIMEOUT a worker ends after it has waited this long; the next task starts one."""
    with processes(MAX_WORKERS=1, IDLE_TIMEOUT=0.05):
        before = pid_of(run_task(tasks.noop))
        wait_until(lambda: not workers(), "the idle worker does not end")
        assert not is_alive(before)
        assert pid_of(run_task(tasks.noop)) != before


def test_close_loses_unfinished_tasks(fifo: Path, tmp_path: Path) -> None:
    with processes(MAX_WORKERS=1):
        result = running(tasks.until_cancelled.enqueue(str(tmp_path / "marker")))
        waiting = tasks.noop.enqueue()
        task_backends["default"].close(timeout=0.1)  # type: ignore[attr-defined]
        assert error_of(finished(result))[0] == error_of(finished(waiting))[0] == "lost"
        assert not is_alive(pid_of(result))
        assert not workers()


def test_close_waits_for_running_task(fifo: Path) -> None:
    with processes(MAX_WORKERS=1):
        result = running(tasks.gated.enqueue(str(fifo)))
        closing = threading.Thread(target=task_backends["default"].close)  # type: ignore[attr-defined]
        closing.start()
        wait_until(lambda: pool()._unfinished._waiters, "close() does not wait for the task")
        fifo.write_text("go", encoding="utf-8")
        assert finished(result).status == SUCCESSFUL
        closing.join(LIMIT)
        assert not is_alive(pid_of(result))


@pytest.mark.parametrize("options", [{"TIMEOUT": 0}, {"START_METHOD": "fork"}, {"MAX_WORKERS": 0}])
def test_options_are_checked(options: dict[str, Any]) -> None:
    with processes(**options), pytest.raises(ImproperlyConfigured, match=next(iter(options))):
        tasks.noop.enqueue()


# Tasks that the dispatcher sends ahead to a busy worker


@pytest.fixture
def short_estimates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the dispatcher estimate that every task is short, however busy the machine is."""
    monkeypatch.setattr(Pace, "estimate", lambda pace, task: 0.0)


def two_in_one_worker(gate: Path) -> tuple[AnyResult, AnyResult]:
    """
    Return a running long task, and a short task that the dispatcher sent ahead to the same worker.

    The caller must keep all workers but one busy.
    """
    first = running(tasks.gated.enqueue(str(gate)))
    long, short = tasks.storm.enqueue(10_000_000), tasks.storm.enqueue(0)
    gate.write_text("go", encoding="utf-8")
    assert finished(first).status == SUCCESSFUL
    return running(long), short


@needs_tickets
@pytest.mark.usefixtures("short_estimates")
def test_a_task_that_was_sent_ahead_can_be_cancelled(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "PATIENCE", LIMIT)
    with processes(MAX_WORKERS=1):
        long, short = two_in_one_worker(fifo)
        assert pool().waiting_in_workers() == 1
        short.refresh()
        assert short.status == TaskResultStatus.READY
        assert cancel(short.id)
        assert error_of(finished(short))[0] == "cancelled"
        assert short.started_at is None
        assert pool().waiting_in_workers() == 0
        long.refresh()
        assert long.status == TaskResultStatus.RUNNING
        cancel(long.id)
        assert error_of(finished(long))[0] == "cancelled"


@needs_tickets
@pytest.mark.usefixtures("short_estimates")
def test_a_short_task_does_not_wait_behind_a_long_one(
    fifo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requeued: list[str] = []
    requeue = Assigner.requeue

    def note(assigner: Assigner, task: ProcessTask) -> None:
        requeued.append(task.id)
        requeue(assigner, task)

    monkeypatch.setattr(Assigner, "requeue", note)
    gate = tmp_path / "second"
    if hasattr(os, "mkfifo"):
        os.mkfifo(gate)
    with processes(MAX_WORKERS=2):
        other = running(tasks.gated.enqueue(str(fifo)))
        long, short = two_in_one_worker(gate)
        fifo.write_text("go", encoding="utf-8")
        assert finished(other).status == SUCCESSFUL
        assert finished(short).status == SUCCESSFUL
        assert requeued == [short.id], "the short task was not sent ahead"
        assert short.worker_ids == other.worker_ids
        long.refresh()
        assert long.status == TaskResultStatus.RUNNING
        cancel(long.id)
        finished(long)


@needs_tickets
@pytest.mark.usefixtures("short_estimates")
def test_tasks_sent_ahead_to_a_killed_worker_are_not_lost(
    fifo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_process, "PATIENCE", LIMIT)
    with processes(MAX_WORKERS=1):
        long, short = two_in_one_worker(fifo)
        assert pool().waiting_in_workers() == 1
        kill(pid_of(long))
        assert error_of(finished(long))[0] == "died"
        assert finished(short).status == SUCCESSFUL
        assert short.worker_ids != long.worker_ids


# The death of worker processes


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("exit", "exit code 3"),
        ("crash", "exit code" if sys.platform == "win32" else "SIGSEGV"),
        ("kernel", "exit code" if sys.platform == "win32" else "SIGKILL"),
        ("terminated", "exit code" if sys.platform == "win32" else "SIGTERM"),
    ],
)
def test_dead_worker_fails_its_own_task_only(fifo: Path, how: str, message: str) -> None:
    other = running(tasks.gated.enqueue(str(fifo)))
    result = run_task(tasks.die, how)
    reason, text = error_of(result)
    assert reason == "died"
    assert message in text
    assert result.errors[0].exception_class_path == "django_tasks_local.exceptions.WorkerDied"
    event = hub.snapshot(result.id)
    assert event is not None
    assert event.progress is not None
    assert event.progress.current == 50, "the last progress is lost"
    assert run_task(tasks.noop).status == SUCCESSFUL
    fifo.write_text("go", encoding="utf-8")
    assert finished(other).status == SUCCESSFUL


def test_kill_busy_worker(fifo: Path) -> None:
    result = running(tasks.gated.enqueue(str(fifo)))
    kill(pid_of(result))
    how = "exit code" if sys.platform == "win32" else "SIGKILL"
    assert how in error_of(finished(result))[1]


def test_stop_task_of_dead_worker(fifo: Path, caplog: pytest.LogCaptureFixture) -> None:
    """
    Race: a worker may die while cancel() stops its task; the dispatcher must raise no exception.
    """
    result = running(tasks.gated.enqueue(str(fifo)))
    record, dispatcher = pool().results.get(result.id), pool().dispatcher
    assert dispatcher is not None
    assert isinstance(record, ProcessTask)
    kill(pid_of(result))
    assert error_of(finished(result))[0] == "died"
    dispatcher.stop(record)
    assert run_task(tasks.noop).status == SUCCESSFUL
    assert "An error in the dispatcher" not in caplog.text


def test_killed_idle_workers_fail_no_task() -> None:
    for _ in range(3):
        pid = pid_of(run_task(tasks.noop))
        kill(pid)
        # No wait here, so that the dispatcher may assign a task before it notices the death.
        assert [run_task(tasks.noop).status for _ in range(5)] == [SUCCESSFUL] * 5


def test_kill_all_workers(tmp_path: Path) -> None:
    results = [running(tasks.until_cancelled.enqueue(str(tmp_path / "m"))) for _ in range(2)]
    waiting = [tasks.noop.enqueue() for _ in range(10)]
    for result in results:
        kill(pid_of(result))
    assert [error_of(finished(result))[0] for result in results] == ["died", "died"]
    assert {finished(result).status for result in waiting} == {SUCCESSFUL}


def test_worker_dies_during_long_result(monkeypatch: pytest.MonkeyPatch) -> None:
    receive = WorkerConnection.receive
    killed = []

    def kill_halfway(connection: WorkerConnection) -> list[Any]:
        messages = receive(connection)
        if connection.reader.incomplete > 1_000_000 and not killed:
            [worker] = [worker for worker in workers() if worker.connection is connection]
            killed.append(worker.worker_id)
            kill(pid_in(worker.worker_id))
        return messages

    monkeypatch.setattr(WorkerConnection, "receive", kill_halfway)
    other = tasks.storm.enqueue(1000)
    result = running(tasks.text.enqueue(100_000_000))
    assert error_of(finished(result))[0] == "died"
    assert finished(other).status == SUCCESSFUL
    assert run_task(tasks.noop).status == SUCCESSFUL


@needs_stop_signal
def test_stopped_worker_delays_no_other() -> None:
    pids = [pid_of(result) for result in (run_task(tasks.noop), run_task(tasks.noop))]
    os.kill(pids[0], signal.SIGSTOP)
    try:
        results = [tasks.length.enqueue("x" * 20_000_000)]  # must not block
        # One of the 21 tasks blocks in the stopped worker; the other worker runs the 20 others.
        results += [tasks.noop.enqueue() for _ in range(20)]
        wait_until(
            lambda: sum(r.is_finished for r in refreshed(results)) >= 20,
            "the other worker is stalled",
        )
    finally:
        os.kill(pids[0], signal.SIGCONT)
    assert {finished(result).status for result in results} == {SUCCESSFUL}


def refreshed(results: list[AnyResult]) -> list[AnyResult]:
    for result in results:
        if not result.is_finished:
            result.refresh()
    return results


def test_worker_killed_during_progress_storm() -> None:
    for _ in range(3):
        victim = running(tasks.storm.enqueue(10_000_000))
        other = running(tasks.storm.enqueue(20_000))
        kill(pid_of(victim))
        assert error_of(finished(victim))[0] == "died"
        assert finished(other).return_value == 20_000


@contextmanager
def recorded_events() -> Iterator[list[Any]]:
    """
    Return a list that a thread fills with all events that the hub publishes during the `with`
    block.
    """
    events: list[Any] = []
    done = threading.Event()

    def read() -> None:
        with hub.subscribe() as subscription:
            started.set()
            while not done.is_set():
                events.extend(subscription.take(0.05))
            events.extend(subscription.take(0))

    started = threading.Event()
    reader = threading.Thread(target=read)
    reader.start()
    started.wait(LIMIT)
    try:
        yield events
    finally:
        done.set()
        reader.join(LIMIT)


def test_random_kills_under_load() -> None:
    """
    After SIGKILL to random workers each task ends once; stress/kill_storm.py does this for longer.
    """
    rng = random.Random(20260)
    finishes: list[str] = []

    def count(sender: Any, task_result: AnyResult, **kwargs: Any) -> None:
        finishes.append(task_result.id)

    task_finished.connect(count)
    try:
        with processes(MAX_WORKERS=3), recorded_events() as events:
            results = []
            deadline = time.monotonic() + 8
            for _ in range(12):
                if time.monotonic() > deadline:
                    break
                results += [tasks.storm.enqueue(rng.randrange(2000)) for _ in range(15)]
                ready = [w for w in workers() if w.was_ready]
                if ready:
                    with suppress(ProcessLookupError):  # The worker has already died.
                        kill(pid_in(rng.choice(ready).worker_id))
                finished(rng.choice(results))
            for result in results:
                finished(result)
            wait_until(lambda: len(finishes) >= len(results), "signals are missing")
    finally:
        task_finished.disconnect(count)
    assert sorted(finishes) == sorted(result.id for result in results), (
        "task_finished was not sent once per task"
    )
    for result in results:
        assert result.status == SUCCESSFUL or error_of_path(result).endswith("WorkerDied")
    last: dict[str, Version] = {}
    for event in events:
        assert event.version > last.get(event.id, NO_VERSION), (
            "an event is older than its predecessor"
        )
        last[event.id] = event.version


def error_of_path(result: AnyResult) -> str:
    return result.errors[0].exception_class_path


@needs_open_files
def test_no_files_threads_or_jobs_leak() -> None:
    with processes(MAX_WORKERS=2):
        for result in [tasks.noop.enqueue() for _ in range(100)]:
            finished(result)
        wait_until(lambda: sum(w.was_ready for w in workers()) == 2, "two workers are not ready")
        before = open_files(), threading.active_count()
        for _ in range(2):
            died = [tasks.die.enqueue("exit") for _ in range(2)]
            for result in [*died, *[tasks.noop.enqueue() for _ in range(300)]]:
                finished(result)
        wait_until(lambda: sum(w.was_ready for w in workers()) == 2, "new workers are not ready")
        # Earlier tests may still close files and end threads, so the numbers may also fall.
        files, threads = before
        wait_until(lambda: open_files() <= files, "workers that died have left files open")
        wait_until(
            lambda: threading.active_count() <= threads, "workers that died have left threads"
        )
        wait_until(
            lambda: not pool()._unfinished.records(), "the pool keeps finished tasks as unfinished"
        )
        assert not pool().queue


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# The start of worker processes


def test_worker_that_cannot_start(caplog: pytest.LogCaptureFixture) -> None:
    broken = [*settings.INSTALLED_APPS, "tests.project.broken"]
    with override_settings(INSTALLED_APPS=broken), processes(MAX_WORKERS=2):
        result = run_task(tasks.noop)
        reason, message = error_of(result)
        assert reason == "died"
        assert "this app has no luck today" in message
        with pytest.raises(RuntimeError, match="this app has no luck today"):
            tasks.noop.enqueue()
        wait_until(lambda: not workers(), "workers are started again and again")
        # A thread of the notifier writes the records of the dispatcher.
        wait_until(lambda: "cannot start" in caplog.text, "no error is logged")
    errors = [record for record in caplog.records if "cannot start" in record.getMessage()]
    assert len(errors) == 1, "the error is not logged exactly once"


@contextmanager
def no_descriptors(but: int = 0) -> Iterator[None]:
    """Let this process open at most `but` more files, as if it had too many streams."""
    import resource  # Windows has no module of this name.

    limit, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = [os.dup(0) for _ in range(but + 1)]
    for descriptor in free:
        os.close(descriptor)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(free), hard_limit))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard_limit))


@contextmanager
def no_threads() -> Iterator[None]:
    def fail(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(threading.Thread, "start", fail)
        yield


@needs_open_files
@pytest.mark.parametrize("shortage", [no_descriptors, no_threads])
def test_enqueue_fails_without_dispatcher(shortage: Any) -> None:
    before = open_files()
    with processes(MAX_WORKERS=1):
        for _ in range(2):
            with shortage(), pytest.raises(RuntimeError, match="no task was enqueued"):
                tasks.noop.enqueue()
        assert pool().results.records() == []
        assert not pool().queue
        assert open_files() == before
        assert run_task(tasks.noop).status == SUCCESSFUL


def kill_only_worker() -> None:
    """Kill the only worker, and wait until the system has refused to start another one."""
    [lost] = workers()
    kill(lost.process.pid)
    wait_until(lambda: not workers(), "the dispatcher does not notice the death")
    wait_until(lambda: starter().failures, "no start was tried")


@needs_open_files
def test_refused_start_is_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "START_ERRORS", 1_000_000)
    monkeypatch.setattr(starting, "START_PAUSE", 0.02)
    with processes(MAX_WORKERS=1):
        first = run_task(tasks.noop)
        before = open_files()
        with no_descriptors():
            kill_only_worker()
            waiting = tasks.noop.enqueue()
            tried = starter().failures
            wait_until(lambda: starter().failures > tried + 2, "the dispatcher gives up")
        assert finished(waiting).status == SUCCESSFUL
        assert pid_of(waiting) != pid_of(first)
        assert open_files() == before


def end_broken_time() -> None:
    """End the pause of the Starter, after the dispatcher has failed the waiting tasks."""
    dispatcher = pool().dispatcher
    assert dispatcher is not None
    dispatcher._loop.post(setattr, dispatcher.starter, "retry_at", 0.0)
    wait_until(lambda: starter().retry_at == 0.0, "the dispatcher runs no commands")


@needs_open_files
@pytest.mark.parametrize("free", [0, 4])
def test_refused_starts_are_given_up(
    free: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """
    The dispatcher gives up after repeated refusals, logs one error and leaks no descriptor.

    With four free descriptors the system refuses halfway through a start, when multiprocessing
    leaks descriptors or its fork server.
    """
    monkeypatch.setattr(starting, "START_PAUSE", 0.02)
    with processes(MAX_WORKERS=1):
        run_task(tasks.noop)
        before = open_files()
        with no_descriptors(but=free):
            kill_only_worker()
            reason, message = error_of(run_task(tasks.noop))
            assert reason == "died"
            assert "Too many open files" in message
            with pytest.raises(RuntimeError, match="Too many open files"):
                tasks.noop.enqueue()
        # A thread of the notifier writes the records of the dispatcher.
        wait_until(lambda: "cannot start worker processes" in caplog.text, "no error is logged")
        end_broken_time()
        assert run_task(tasks.noop).status == SUCCESSFUL
        assert caplog.text.count("cannot start worker processes") == 1
        assert open_files() == before


def test_overridden_settings_in_worker() -> None:
    with override_settings(MEDIA_ROOT="/somewhere/else"), processes(MAX_WORKERS=1):
        assert run_task(tasks.media_root).return_value == "/somewhere/else"


def test_database_in_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(connection.settings_dict, "NAME", ":memory:")
    with processes(MAX_WORKERS=1), pytest.raises(ImproperlyConfigured, match="in memory"):
        tasks.noop.enqueue()


class TestDatabase(TransactionTestCase):
    """A task in a worker process uses the test database and must not touch the configured one."""

    def test_task_uses_the_test_database(self) -> None:
        result = run_task(tasks.make_user, "ada")
        name, users = result.return_value
        assert name == str(connection.settings_dict["NAME"])
        assert users == 1

        from django.contrib.auth import get_user_model

        assert get_user_model().objects.get().username == "ada"


def test_workers_with_another_database_are_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with processes(MAX_WORKERS=1):
        before = pid_of(run_task(tasks.noop))
        monkeypatch.setitem(settings.DATABASES["default"], "NAME", str(tmp_path / "other.sqlite3"))
        assert pid_of(run_task(tasks.noop)) != before


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_tasks_compute_concurrently() -> None:
    """
    Two workers run tasks at overlapping times, and the parent process itself uses little CPU time.

    The duration of the tasks would prove nothing, because other programs may use the machine.
    """
    for result in [tasks.noop.enqueue() for _ in range(10)]:
        finished(result)
    wait_until(lambda: sum(w.was_ready for w in workers()) == 2, "two workers are not ready")
    before = os.times().user
    results = [tasks.burn.enqueue(500_000) for _ in range(4)]
    assert len({pid_of(finished(result)) for result in results}) == 2
    spans = [(result.started_at, result.finished_at) for result in results]
    assert any(a[0] < b[0] < a[1] for a in spans for b in spans), "no two tasks run concurrently"
    assert os.times().user - before < 2
