"""
Backends that take the place of Django's ImmediateBackend and DummyBackend in Django's tests.

Both subclass the backend under test: FinishingBackend returns finished results from `enqueue()`;
HeldBackend lists its tasks and starts none while a Gate is closed.
"""

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from django.tasks import TaskResult, task_backends
from django.tasks.exceptions import TaskResultDoesNotExist

import django_tasks_local
from django_tasks_local.events import EventKind
from django_tasks_local.hub import hub
from django_tasks_local.testing import wait_until_idle
from tests.core.django_suite.gate import wait_at_gate
from tests.core.django_suite.settings import KIND
from tests.project import gates

Backend: Any = getattr(django_tasks_local, KIND)

type AnyResult = TaskResult[Any, Any]


class FinishingBackend(Backend):
    """A backend whose `enqueue()` returns when the task has finished, as with ImmediateBackend."""

    def enqueue(self, *args: Any, **kwargs: Any) -> AnyResult:
        result: AnyResult = super().enqueue(*args, **kwargs)
        wait_until_idle(self.alias)
        result.refresh()
        return result


class HeldBackend(Backend):
    """
    A backend that lists its tasks and, while a Gate is closed, starts none, as DummyBackend does.
    """

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        options = params.get("OPTIONS", {})
        super().__init__(alias, {**params, "OPTIONS": {**options, "MAX_WORKERS": 1}})
        self.options = options  # One of Django's tests compares `options` with TASKS.
        self.results: list[AnyResult] = []

    def enqueue(self, *args: Any, **kwargs: Any) -> AnyResult:
        result: AnyResult = super().enqueue(*args, **kwargs)
        self.results.append(result)
        return result

    def clear(self) -> None:
        """Empty the list of tasks, as DummyBackend.clear() does."""
        self.results.clear()


class Gate:
    """A lock for which a task in the default backend's only worker waits until `open()`."""

    def __init__(self) -> None:
        descriptor, self._path = tempfile.mkstemp()
        os.close(descriptor)
        self._gate = gates.Gate(self._path)
        backend = default_backend()
        # HeldBackend.enqueue() would list this task, and Django's tests count the listed tasks.
        result = super(HeldBackend, backend).enqueue(wait_at_gate, (self._path,), {})
        kinds: set[EventKind] = set()
        with hub.subscribe(result.id) as subscription:
            while EventKind.STARTED not in kinds:
                assert not subscription.ended, "the task that keeps the worker busy has ended"
                kinds = {event.kind for event in subscription.take()}

    def open(self) -> None:
        """Cancel the waiting tasks and let the worker continue."""
        backend = default_backend()
        for result in backend.results:
            # If the test replaced TASKS, the backend has discarded its pool and the pool's results.
            with suppress(TaskResultDoesNotExist):
                backend.cancel(result.id)
        self._gate.set()
        wait_until_idle("default")
        Path(self._path).unlink(missing_ok=True)


def default_backend() -> HeldBackend:
    """Return the default backend in a test that Django runs with DummyBackend."""
    return cast("HeldBackend", task_backends["default"])
