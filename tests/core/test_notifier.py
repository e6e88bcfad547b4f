"""The notifier calls receivers and log handlers in threads of its own."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar
from typing import Any

import pytest
from django.dispatch import Signal
from django.tasks import signals, task_backends

from django_tasks_local import notifier as notifier_module
from django_tasks_local import pools
from django_tasks_local.exceptions import TaskCancelled
from django_tasks_local.notifier import MAX_THREADS, Notifier
from django_tasks_local.testing import wait_until_idle
from tests.project import process_tasks, tasks
from tests.support.backends import settings_with
from tests.support.waiting import LIMIT, finished, wait_until


@pytest.fixture
def connect() -> Iterator[Callable[[Signal, Callable[..., None]], None]]:
    """Return a function that connects a receiver to a signal until the end of the test."""
    connected: list[tuple[Signal, Callable[..., None]]] = []

    def connect_until_end(signal: Signal, receiver: Callable[..., None]) -> None:
        signal.connect(receiver)
        connected.append((signal, receiver))

    yield connect_until_end
    for signal, receiver in connected:
        signal.disconnect(receiver)


@pytest.fixture
def released() -> Iterator[threading.Event]:
    """Return an event for which receivers wait, and which is set at the end of the test."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture
def notifier() -> Iterator[Notifier]:
    made = Notifier("test")
    yield made
    made.close()


@pytest.mark.parametrize("name", ["started", "finished"])
def test_a_receiver_that_waits_does_not_stop_process_tasks(
    name: str, connect: Any, released: threading.Event
) -> None:
    """A process task finishes while the receiver of an earlier one waits for a row lock."""
    blocked = threading.Event()

    def wait(**kwargs: Any) -> None:
        if not blocked.is_set():
            blocked.set()
            released.wait(LIMIT)

    with settings_with(MAX_WORKERS=1):
        connect(getattr(signals, f"task_{name}"), wait)
        first = tasks.noop.using(backend="processes").enqueue()
        assert blocked.wait(LIMIT)
        second = tasks.add.using(backend="processes").enqueue(1)
        assert finished(second).return_value == 2
        assert finished(first).is_finished
        assert not released.is_set()
        released.set()
        wait_until_idle("processes")


def test_a_log_handler_that_waits_does_not_stop_process_tasks(released: threading.Event) -> None:
    """A process task finishes while AdminEmailHandler waits for a mail server."""
    blocked = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            blocked.set()
            released.wait(LIMIT)

    handler = Handler(logging.ERROR)
    logger = logging.getLogger("django.tasks")
    with settings_with(MAX_WORKERS=1):
        logger.addHandler(handler)
        try:
            tasks.fail.using(backend="processes").enqueue()
            assert blocked.wait(LIMIT)
            assert finished(tasks.add.using(backend="processes").enqueue(1)).return_value == 2
            assert not released.is_set()
            released.set()
            wait_until_idle("processes")
        finally:
            logger.removeHandler(handler)


def test_cancel_of_a_waiting_task_does_not_wait_for_receivers(
    alias: str, gate: str, connect: Any, released: threading.Event
) -> None:
    """cancel() returns in a web request while a receiver of task_finished waits."""

    def wait(task_result: Any, **kwargs: Any) -> None:
        if task_result.id == waiting.id:
            released.wait(LIMIT)

    with settings_with(MAX_WORKERS=1):
        first = tasks.gated.using(backend=alias).enqueue(gate)
        wait_until(lambda: first.refresh() or first.status == "RUNNING", "the task did not start")
        waiting = tasks.noop.using(backend=alias).enqueue()
        connect(signals.task_finished, wait)
        backend: Any = task_backends[alias]
        assert backend.cancel(waiting.id)
        assert not released.is_set()
        waiting.refresh()
        assert waiting.errors[0].exception_class is TaskCancelled
        assert [result.id for result in backend.wait_until_idle(0)] == [first.id, waiting.id]
        released.set()
        tasks.gates[gate].set()
        wait_until_idle(alias)


def test_close_waits_for_receivers_for_a_limited_time(
    alias: str, connect: Any, released: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A receiver that never returns does not stop the end of the process."""
    monkeypatch.setattr("django_tasks_local.pools.base.RECEIVERS_SECONDS", 0.0)

    def wait(**kwargs: Any) -> None:
        released.wait()

    with settings_with(MAX_WORKERS=1):
        backend: Any = task_backends[alias]
        result = tasks.noop.using(backend=alias).enqueue()
        finished(result)
        wait_until_idle(alias)
        connect(signals.task_finished, wait)
        gate_free = threading.Thread(target=backend.close, args=(0,))
        second = process_tasks.noop.using(backend=alias).enqueue()
        gate_free.start()
        gate_free.join(LIMIT)
        assert not gate_free.is_alive()
        assert not released.is_set()
        second.refresh()
        assert second.is_finished
        released.set()


variable: ContextVar[str] = ContextVar("variable")


def test_receivers_of_one_process_task_share_a_context(connect: Any) -> None:
    """A variable that a receiver of task_started binds is bound in task_finished, for its task."""
    seen: dict[str, str | None] = {}

    def bind(task_result: Any, **kwargs: Any) -> None:
        assert variable.get(None) is None
        variable.set(task_result.id)

    def note(task_result: Any, **kwargs: Any) -> None:
        seen[task_result.id] = variable.get(None)

    with settings_with(MAX_WORKERS=2):
        connect(signals.task_started, bind)
        connect(signals.task_finished, note)
        results = [tasks.noop.using(backend="processes").enqueue() for _ in range(10)]
        wait_until_idle("processes")
    assert seen == {result.id: result.id for result in results}


def test_receivers_of_process_tasks_get_the_state_of_their_signal(connect: Any) -> None:
    """The result that task_started sends is RUNNING, although the task has ended in between."""
    statuses: list[str] = []

    def note(task_result: Any, **kwargs: Any) -> None:
        statuses.append(task_result.status)

    with settings_with(MAX_WORKERS=1):
        connect(signals.task_started, note)
        connect(signals.task_finished, note)
        tasks.noop.using(backend="processes").enqueue()
        wait_until_idle("processes")
    assert statuses == ["RUNNING", "SUCCESSFUL"]


def test_log_records_of_a_process_task(caplog: pytest.LogCaptureFixture) -> None:
    with settings_with(MAX_WORKERS=1), caplog.at_level(logging.INFO, logger="django.tasks"):
        result = tasks.noop.using(backend="processes").enqueue()
        wait_until_idle("processes")
    messages = [r.getMessage() for r in caplog.records if result.id in r.getMessage()]
    path = f"Task id={result.id} path=tests.project.tasks.noop"
    assert messages == [f"{path} state=RUNNING", f"{path} state=SUCCESSFUL"]


def test_calls_of_one_id_are_made_in_order_in_one_thread(notifier: Notifier) -> None:
    made: dict[str, list[tuple[int, str]]] = {str(id): [] for id in range(20)}
    done = threading.Semaphore(0)

    def note(id: str, number: int) -> None:
        made[id].append((number, threading.current_thread().name))
        done.release()

    for number in range(5):
        for id in made:
            notifier.post(id, Context(), note, id, number)
    for _ in range(100):
        assert done.acquire(timeout=LIMIT)
    for calls in made.values():
        assert [number for number, _ in calls] == list(range(5))
        assert len({name for _, name in calls}) == 1
    names = {name for calls in made.values() for _, name in calls}
    assert names <= {f"django-tasks-notifier-test-{number}" for number in range(MAX_THREADS)}


def test_a_full_backlog_drops_the_oldest_calls(
    notifier: Notifier, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """While a call waits, the oldest of the calls behind it are dropped, and one ERROR says so."""
    monkeypatch.setattr(notifier_module, "MAX_WAITING", 3)
    began, release, done = threading.Event(), threading.Event(), threading.Event()
    made: list[int] = []
    dropped: list[int] = []

    def wait() -> None:
        began.set()
        release.wait(LIMIT)

    notifier.post("id", Context(), wait)
    assert began.wait(LIMIT)
    for number in range(5):
        post = notifier.post
        post("id", Context(), made.append, number, on_drop=lambda n=number: dropped.append(n))
    assert dropped == [0, 1]
    wait_until(lambda: "has dropped 1 signals" in caplog.text, "the first drop was not logged")
    release.set()
    notifier.post("id", Context(), done.set)
    assert done.wait(LIMIT)
    assert made == [3, 4] or made == [2, 3, 4]
    assert caplog.records[0].levelname == "ERROR"


def test_calls_after_close_are_made(notifier: Notifier) -> None:
    """A task that another thread enqueues while its pool is closed still sends its signals."""
    for _ in range(50):
        done = threading.Event()
        notifier.post("id", Context(), done.set)
        notifier.close()
        assert done.wait(LIMIT)
        done = threading.Event()
        notifier.post("id", Context(), done.set)
        assert done.wait(LIMIT)


def test_threads_end_after_close(notifier: Notifier) -> None:
    done = threading.Event()
    notifier.post("id", Context(), done.set)
    assert done.wait(LIMIT)
    notifier.close()

    def threads() -> list[str]:
        return [t.name for t in threading.enumerate() if "notifier-test" in t.name]

    wait_until(lambda: not threads(), "the thread did not end")


def test_without_a_thread_the_caller_makes_the_call(
    notifier: Notifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the exit of Python 3.12 no thread can be started, but receivers are called."""

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    made: list[str] = []
    notifier.post("id", Context(), made.append, "call")
    assert made == ["call"]


def test_a_receiver_that_raises_system_exit_ends_no_thread(
    notifier: Notifier, caplog: pytest.LogCaptureFixture
) -> None:
    done = threading.Event()

    def fail() -> None:
        raise SystemExit(1)

    notifier.post("id", Context(), fail)
    notifier.post("id", Context(), done.set)
    assert done.wait(LIMIT)
    assert "A receiver failed for task id=id." in caplog.text


def test_log_handlers_of_the_dispatcher_run_in_a_notifier_thread(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A handler that waits for a mail server does not stop the dispatcher after its own error."""
    threads: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            threads.append(threading.current_thread().name)

    def fail() -> None:
        raise ValueError("an error in the dispatcher")

    handler = Handler()
    logger = logging.getLogger("django_tasks_local.processes.loop")
    logger.addHandler(handler)
    try:
        with settings_with(MAX_WORKERS=1):
            finished(tasks.noop.using(backend="processes").enqueue())
            [pool] = [pool for pool in pools.all_pools() if pool.alias == "processes"]
            pool.dispatcher._loop.post(fail)  # type: ignore[attr-defined]
            wait_until(lambda: threads, "nothing was logged")
    finally:
        logger.removeHandler(handler)
    assert threads[0].startswith("django-tasks-notifier-processes-")
    [record] = [r for r in caplog.records if r.name == logger.name]
    assert (record.funcName, record.levelname) == ("call", "ERROR")
    assert record.exc_info
    assert record.exc_info[0] is ValueError
    assert "the thread 'django-tasks-processes-dispatcher'" in record.getMessage()
