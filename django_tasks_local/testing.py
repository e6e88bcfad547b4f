"""
Help for tests of code that uses tasks: wait until they are done, and see their progress.

With pytest, `pytest_plugins = ["django_tasks_local.testing"]` in `conftest.py`, or an import there,
gives the fixtures `idle_tasks` and `task_progress`. Without pytest this module has no fixtures.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from django.tasks import TaskResult, task_backends
from django.tasks.backends.immediate import ImmediateBackend

from .backends import LocalBackend
from .events import EventKind
from .hub import hub

try:
    import pytest
except ModuleNotFoundError:
    pytest = None  # type: ignore[assignment]

if TYPE_CHECKING:
    from collections.abc import Iterator

    from django.tasks import Task

    from .events import TaskEvent

TIMEOUT = 10.0  # seconds


def wait_until_idle(backend: str = "default", timeout: float = TIMEOUT) -> None:
    """
    Wait until the backend with this alias has no unfinished task in this process.

    The receivers of `task_finished` have run then too, and so have the tasks that they, or other
    tasks, have enqueued meanwhile. A task of Django's ImmediateBackend has finished when enqueue()
    returns, so there is nothing to wait for. Not for an event loop's thread: use
    `asyncio.to_thread()` there.

    Raises TimeoutError that names each task which still runs or waits after `timeout` seconds, and
    NotImplementedError for a backend that neither runs its tasks in this process nor at once.
    """
    backend_instance = task_backends[backend]
    if isinstance(backend_instance, ImmediateBackend):
        return
    if not isinstance(backend_instance, LocalBackend):
        raise NotImplementedError(
            f"The task backend {backend!r} ({type(backend_instance).__qualname__}) cannot tell "
            f"which tasks are unfinished."
        )
    unfinished = [
        f"{result.id} ({result.task.module_path}, {result.status})"
        for result in backend_instance.wait_until_idle(timeout)
    ]
    if unfinished:
        raise TimeoutError(
            f"The task backend {backend!r} is not idle after {timeout:g} seconds. Unfinished: "
            f"{', '.join(unfinished)}."
        )


@contextmanager
def collect_progress(*tasks: Task[Any, Any] | TaskResult[Any, Any]) -> Iterator[list[TaskEvent]]:
    """
    Collect the progress events that are published in the `with` block, in a list that grows.

    With arguments only those of these tasks, which are told apart by the name of their function, or
    of these results. Nothing that is published is
    missed, but progress is throttled before: at most one event of a task is published in the time
    of its option PROGRESS_INTERVAL, which is 0.05 seconds for tasks of other backends. What it has
    reported last is always there: when only its `finished` event tells it, that is in the list.
    With `"PROGRESS_INTERVAL": 0` there is an event for each call of report_progress(); the steps of
    track() are sampled even so.
    """
    ids = {task.id for task in tasks if isinstance(task, TaskResult)}
    names = {task.name for task in tasks if not isinstance(task, TaskResult)}
    events: list[TaskEvent] = []
    last: dict[str, object] = {}

    def record(event: TaskEvent) -> None:
        if event.progress is None or (tasks and event.id not in ids and event.name not in names):
            return
        progress = event.progress
        told = progress.current, progress.total, progress.message, progress.data
        if event.kind is EventKind.PROGRESS or told != last.get(event.id):
            last[event.id] = told
            events.append(event)

    with hub.recording(record):
        yield events


if pytest is not None:

    @pytest.fixture
    def idle_tasks() -> Iterator[None]:
        """At the end of the test, wait until the backends of this package are idle, or fail."""
        yield
        for alias in task_backends.settings:
            if isinstance(task_backends[alias], LocalBackend):
                wait_until_idle(alias)

    @pytest.fixture
    def task_progress() -> Iterator[list[TaskEvent]]:
        """Return the list of all progress events in this test; see collect_progress()."""
        with collect_progress() as events:
            yield events
