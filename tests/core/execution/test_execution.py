"""
A task runs in a clean context; its worker closes the connections and caches that the task opened.
"""

import sqlite3
import threading
from collections.abc import Iterator
from dataclasses import fields
from typing import Any, ClassVar

import pytest
from django.core.cache import cache
from django.core.cache.backends.locmem import LocMemCache
from django.db import connection, connections
from django.tasks import Task
from django.tasks.signals import task_finished, task_started
from django.test import override_settings

from django_tasks_local.execution import connections as resources
from tests.project import tasks
from tests.support.waiting import finished, wait_until

ONE_WORKER = {
    "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": {"MAX_WORKERS": 1}}
}


def test_context_does_not_leak_into_next_task(gate: str) -> None:
    tasks.marker.set("from the request")
    with override_settings(TASKS=ONE_WORKER, LANGUAGE_CODE="en", TIME_ZONE="UTC"):
        for _ in range(3):
            finished(tasks.leave_traces.enqueue(gate))
    assert tasks.notes[gate] == [(None, "en", "UTC")] * 3
    assert tasks.marker.get() == "from the request"


@pytest.mark.django_db(transaction=True)
def test_connection_of_task_is_closed(gate: str) -> None:
    with override_settings(TASKS=ONE_WORKER):
        for _ in range(3):
            assert finished(tasks.query.enqueue(gate)).return_value == 0
            # The worker closes the connection before it publishes `finished`.
            assert all(is_closed(opened) for opened in tasks.notes[gate])
    assert len(tasks.notes[gate]) == 3


def is_closed(opened: object) -> bool:
    try:
        opened.execute("SELECT 1")  # type: ignore[attr-defined]
    except sqlite3.ProgrammingError as error:
        return "closed" in str(error)
    return False


@pytest.mark.django_db(transaction=True)
def test_connection_of_receiver_is_closed(gate: str) -> None:
    seen = []

    def receive(**kwargs: object) -> None:
        with connections["default"].cursor() as cursor:
            cursor.execute("SELECT 1")
        seen.append(connections["default"].connection)

    for signal in (task_started, task_finished):
        signal.connect(receive)
    try:
        with override_settings(TASKS=ONE_WORKER):
            finished(tasks.noop.enqueue())
            finished(tasks.noop.enqueue())
            wait_until(lambda: len(seen) == 4, "a receiver was not called")
            wait_until(lambda: all(map(is_closed, seen)), "a connection stays open")
    finally:
        for signal in (task_started, task_finished):
            signal.disconnect(receive)


@pytest.mark.django_db(transaction=True)
def test_connection_of_coroutine_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    close_thread_resources = resources.close_thread_resources

    def note_and_close() -> None:
        if connections["default"].connection is not None:
            opened.append(connections["default"].connection)
        close_thread_resources()

    monkeypatch.setattr(resources, "close_thread_resources", note_and_close)
    assert finished(tasks.query_async.enqueue()).return_value == 0
    # The thread that ran the query for the coroutine has closed its own connection.
    assert len(opened) == 1
    assert is_closed(opened[0])


@pytest.mark.django_db(transaction=True)
def test_asyncio_run_in_sync_tasks_uses_one_global_thread(gate: str) -> None:
    """
    The ORM's calls in asyncio.run() use a thread of the task, whose connection is closed with it.

    In the one thread that asgiref has for the whole process a broken connection would stay.
    """
    with override_settings(TASKS=ONE_WORKER):
        for _ in range(2):
            assert finished(tasks.query_in_own_loop.enqueue(gate)).status == "SUCCESSFUL"
    for name, opened in tasks.notes[gate]:
        assert name == "django-tasks-sync"
        assert is_closed(opened)


class RecordedCache(LocMemCache):
    """A cache that records the name of each thread that calls close()."""

    closed: ClassVar[list[str]] = []
    fails = False

    def close(self, **kwargs: object) -> None:
        self.closed.append(threading.current_thread().name)
        if self.fails:
            raise OSError("the cache is unreachable")


@pytest.fixture
def recorded_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(RecordedCache, "closed", [])
    path = f"{__name__}.{RecordedCache.__qualname__}"
    with override_settings(CACHES={"default": {"BACKEND": path}}):
        yield


@pytest.mark.parametrize("task", [tasks.use_cache, tasks.use_cache_async])
def test_cache_of_task_is_closed(recorded_cache: None, task: Any) -> None:
    """The worker finds the caches to close in the task's context, where asgiref stores them."""
    with override_settings(TASKS=ONE_WORKER):
        assert finished(task.enqueue()).return_value == "value"
        assert RecordedCache.closed
        # The worker closes caches again after the receivers of task_finished, before the next task.
        finished(tasks.noop.enqueue())
        before = len(RecordedCache.closed)
        finished(tasks.noop.enqueue())
        assert len(RecordedCache.closed) == before


def test_error_in_cleanup_is_logged(
    recorded_cache: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(RecordedCache, "fails", True)
    assert finished(tasks.use_cache.enqueue()).return_value == "value"
    assert "close_caches() failed before or after a task." in caplog.text
    assert "the cache is unreachable" in caplog.text


@pytest.mark.parametrize("alias", ["default", "processes"])
def test_cache_of_receiver_is_closed(recorded_cache: None, alias: str) -> None:
    def receive(**kwargs: object) -> None:
        cache.get("key")

    backends = ONE_WORKER | {
        "processes": {
            "BACKEND": "django_tasks_local.ProcessPoolBackend",
            "OPTIONS": {"MAX_WORKERS": 1},
        }
    }
    for signal in (task_started, task_finished):
        signal.connect(receive)
    try:
        with override_settings(TASKS=backends):
            finished(tasks.noop.using(backend=alias).enqueue())
            wait_until(lambda: RecordedCache.closed, "the cache stays open")
    finally:
        for signal in (task_started, task_finished):
            signal.disconnect(receive)


def test_cleanup_of_remaining_child_runs_in_daemon_thread() -> None:
    """
    The cleanup of a child asyncio task calls sync code in a daemon thread.

    A thread that is no daemon would delay the end of the process.
    """
    assert finished(tasks.leave_a_child.enqueue()).status == "SUCCESSFUL"
    tasks.children.clear()
    assert tasks.notes["child"] == ["django-tasks-sync"]


def test_tasks_fail_if_no_thread_starts(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    results = []
    others = [tasks.add]

    def fail(thread: threading.Thread) -> None:
        if others:  # Simulates another thread that enqueues while this worker starts.
            results.append(others.pop().enqueue(2))
        raise RuntimeError("can't start new thread")

    with override_settings(TASKS=ONE_WORKER):
        with monkeypatch.context() as broken:
            broken.setattr(threading.Thread, "start", fail)
            results.append(tasks.add.enqueue(1))
        assert len(results) == 2
        for result in results:
            result.refresh()
            assert result.errors[0].exception_class is RuntimeError
        assert "has no worker" in caplog.text
        assert finished(tasks.add.enqueue(1)).return_value == 2
        for result in results:
            result.refresh()
            assert result.attempts == 0, "the failed task has run later"


@pytest.mark.django_db(transaction=True)
def test_connection_of_caller_stays_open() -> None:
    connection.ensure_connection()
    opened = connection.connection
    finished(tasks.noop.enqueue())
    assert connection.connection is opened
    assert not is_closed(opened)


class Doubled(Task):
    """A Task whose call() doubles the return value of its function."""

    def call(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().call(*args, **kwargs)


def test_call_of_custom_task_class() -> None:
    doubled = Doubled(**{field.name: getattr(tasks.add, field.name) for field in fields(Task)})
    assert finished(doubled.enqueue(3, b=4)).return_value == 14
