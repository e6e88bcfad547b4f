"""This module names types that several modules share, and defines how a caller names a task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID

from django.tasks import Task, TaskResult

from .events import TaskEvent

if TYPE_CHECKING:
    from collections.abc import Iterable

type AnyTask = Task[Any, Any]
type AnyResult = TaskResult[Any, Any]
type Number = int | float

# The alias of a backend and the id of a result identify a task in this process together, because
# two backends may both have a task "1".
type TaskKey = tuple[str, str]


def task_reference(value: Any, backend: str | None = None) -> tuple[str | None, str]:
    """
    Return the backend alias and the id of a task; the alias is None if it is unknown.

    `value` is a TaskResult or a TaskEvent, which have an alias, or the id as a str or a UUID, whose
    alias is `backend`. A value of another type raises TypeError, and a TaskResult of another
    backend than `backend` raises ValueError.
    """
    if isinstance(value, str):
        return backend, value
    if isinstance(value, (TaskResult, TaskEvent)):
        if backend is not None and backend != value.backend:
            raise ValueError(
                f"The task {value.id!r} belongs to the task backend {value.backend!r}, "
                f"not to {backend!r}."
            )
        return value.backend, value.id
    if isinstance(value, UUID):
        return backend, str(value)
    raise TypeError(
        f"A task is named by its TaskResult or by the id of its result (str or UUID), "
        f"not by {value!r:.200}."
    )


def ambiguous_id(id: str, aliases: Iterable[str]) -> ValueError:
    """Return the exception for an id without an alias that tasks of several backends have."""
    names = " and ".join(map(repr, sorted(aliases)))
    return ValueError(
        f"The id {id!r} is ambiguous: the task backends {names} each have a task with it. "
        f"Pass the TaskResult, which names its backend, or `backend=`."
    )
