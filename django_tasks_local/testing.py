"""
This module helps tests of code that uses tasks to wait for the tasks and check their progress.

With pytest, write `pytest_plugins = ["django_tasks_local.testing"]` into `conftest.py`, or import
the fixtures `idle_tasks`, `immediate_tasks` and `task_progress` there. Without pytest this module
has no fixtures.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.tasks import TaskResult, task_backends
from django.tasks.backends.immediate import ImmediateBackend
from django.test import override_settings

from .backends import LocalBackend
from .checks import CALLED_BY_USERS
from .events import EventKind
from .hub import hub

try:
    import pytest
except ModuleNotFoundError:
    pytest = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.tasks import Task

    from .aliases import TaskKey
    from .events import TaskEvent

TIMEOUT = 10.0  # wait_until_idle() raises TimeoutError after this many seconds by default.


def wait_until_idle(backend: str = "default", timeout: float = TIMEOUT) -> None:
    """
    Wait until the backend with this alias has no unfinished task in this process.

    It also waits for the receivers of `task_finished`, and for tasks that receivers or other tasks
    enqueue during the wait. For Django's ImmediateBackend it returns at once, because enqueue() has
    run the task. It blocks, so call it in an event loop as `asyncio.to_thread(wait_until_idle)`.

    It warns in a TestCase, whose rows the tasks do not see, and which does not remove their rows.

    Raises TimeoutError that names each task that is unfinished after `timeout` seconds, and
    NotImplementedError for a backend that is neither of this package nor an ImmediateBackend.
    """
    backend_instance = task_backends[backend]
    if isinstance(backend_instance, ImmediateBackend):
        return
    if not isinstance(backend_instance, LocalBackend):
        raise NotImplementedError(
            f"The task backend {backend!r} ({type(backend_instance).__qualname__}) cannot tell "
            f"which tasks are unfinished."
        )
    _warn_in_test_case(backend)
    unfinished = [
        f"{result.id} ({result.task.module_path}, {result.status})"
        for result in backend_instance.wait_until_idle(timeout)
    ]
    if unfinished:
        raise TimeoutError(
            f"The task backend {backend!r} is not idle after {timeout:g} seconds. Unfinished: "
            f"{', '.join(unfinished)}."
        )


def _warn_in_test_case(backend: str) -> None:
    connection: Any
    for connection in connections.all(initialized_only=True):
        if any(block._from_testcase for block in connection.atomic_blocks):  # noqa: SLF001
            warnings.warn(
                f"A test in a transaction waits for tasks of {backend!r}. They use other "
                f"connections to the database {connection.alias!r}: they do not see the rows of "
                f"the test, and the rows that they write remain for later tests. Use "
                f"TransactionTestCase, @pytest.mark.django_db(transaction=True) or "
                f"django_tasks_local.testing.run_immediately().",
                RuntimeWarning,
                skip_file_prefixes=CALLED_BY_USERS,
            )
            return


@contextmanager
def run_immediately() -> Iterator[None]:
    """
    Replace the backend of every alias by Django's ImmediateBackend in the `with` block.

    enqueue() then runs the task in the test's thread and transaction, so this works in a TestCase.
    The pools that are in use at the beginning of the block are closed, as by override_settings().
    """
    queues = {
        alias: {"QUEUES": settings["QUEUES"]} if "QUEUES" in settings else {}
        for alias, settings in task_backends.settings.items()
    }
    path = f"{ImmediateBackend.__module__}.{ImmediateBackend.__qualname__}"
    with override_settings(TASKS={a: {"BACKEND": path, **queue} for a, queue in queues.items()}):
        yield


@contextmanager
def collect_progress(*tasks: Task[Any, Any] | TaskResult[Any, Any]) -> Iterator[list[TaskEvent]]:
    """
    Return a list that collects the progress events that are published in the `with` block.

    With arguments it collects only events of tasks with the same function name as one of these
    tasks, and of these results. The list has every published event, but a task publishes at most
    one progress event in the time of its option PROGRESS_INTERVAL, which is 0.05 seconds for tasks
    of other backends. The list always has the last progress of a task: if no progress event had it,
    the list has the `finished` event. With `"PROGRESS_INTERVAL": 0` each call of report_progress()
    publishes an event, but the steps of track() are still sampled.
    """
    keys = {(task.backend, task.id) for task in tasks if isinstance(task, TaskResult)}
    names = {task.name for task in tasks if not isinstance(task, TaskResult)}
    events: list[TaskEvent] = []
    last: dict[TaskKey, object] = {}

    def record(event: TaskEvent) -> None:
        if event.progress is None or (tasks and event.key not in keys and event.name not in names):
            return
        progress = event.progress
        told = progress.current, progress.total, progress.message, progress.data
        if event.kind is EventKind.PROGRESS or told != last.get(event.key):
            last[event.key] = told
            events.append(event)

    with hub.recording(record):
        yield events


if pytest is not None:

    @pytest.fixture
    def idle_tasks() -> Iterator[None]:
        """Wait at the end of the test until the backends of this package are idle, or fail."""
        yield
        for alias in task_backends.settings:
            if isinstance(task_backends[alias], LocalBackend):
                wait_until_idle(alias)

    @pytest.fixture
    def immediate_tasks() -> Iterator[None]:
        """Run each task of this test in enqueue(), whatever backend the settings name."""
        with run_immediately():
            yield

    @pytest.fixture
    def task_progress() -> Iterator[list[TaskEvent]]:
        """Return the list in which collect_progress() collects all progress events of this test."""
        with collect_progress() as events:
            yield events
