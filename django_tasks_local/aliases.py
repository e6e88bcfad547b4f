"""Names for types that several modules share, and the one rule for what names a task."""

from __future__ import annotations

from typing import Any
from uuid import UUID

from django.tasks import Task, TaskResult

from .events import TaskEvent

type AnyTask = Task[Any, Any]
type AnyResult = TaskResult[Any, Any]
type Number = int | float

# What identifies a task in this process: the alias of its backend and the id of its result. Two
# backends may both have a task "1".
type TaskKey = tuple[str, str]


def task_reference(value: Any) -> tuple[str | None, str]:
    """
    Return the backend alias, None if it is unknown, and the id of a task.

    `value` is a TaskResult or a TaskEvent, which bring their alias, or the id as a str or a UUID.
    Raises TypeError for anything else.
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
