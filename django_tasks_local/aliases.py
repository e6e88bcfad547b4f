"""This module names types that several modules share, and defines how a caller names a task."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.tasks import Task, TaskResult

from .events import TaskEvent

type AnyTask = Task[Any, Any]
type AnyResult = TaskResult[Any, Any]
type Number = int | float

# The alias of a backend and the id of a result identify a task in this process together, because
# two backends may both have a task "1".
type TaskKey = tuple[str, str]


def task_reference(value: Any) -> tuple[str | None, str]:
    """
    Return the backend alias and the id of a task; the alias is None if `value` does not have it.

    `value` is a TaskResult or a TaskEvent, which have an alias, or the id as a str or a UUID. A
    value of another type raises TypeError.
    """
    if isinstance(value, str):
        return None, value
    if isinstance(value, (TaskResult, TaskEvent)):
        return value.backend, value.id
    if isinstance(value, UUID):
        return None, str(value)
    raise TypeError(
        f"A task is named by its TaskResult or by the id of its result (str or UUID), "
        f"not by {value!r:.200}."
    )
