"""make_result() creates Django's TaskResult fast, from values that are normalized already."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from django.tasks import TaskResult

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import datetime

    from django.tasks import TaskResultStatus
    from django.tasks.base import TaskError

    from .aliases import AnyResult, AnyTask

FIELDS = (
    "task",
    "id",
    "status",
    "enqueued_at",
    "started_at",
    "finished_at",
    "last_attempted_at",
    "args",
    "kwargs",
    "backend",
    "errors",
    "worker_ids",
    "_return_value",
)


def _find_setters() -> tuple[Callable[[Any, Any], None], ...] | None:
    """
    Return the setters of TaskResult's slots in the order of FIELDS; None if it has other fields.

    The setters are used because TaskResult is frozen, and its constructor takes six times as long,
    because it normalizes the arguments again.
    """
    slots = vars(TaskResult)
    if {field.name for field in fields(TaskResult)} != {*FIELDS} or not slots.keys() >= {*FIELDS}:
        return None
    return tuple(slots[name].__set__ for name in FIELDS)


_setters = _find_setters()


def make_result(
    task: AnyTask,
    id: str,
    status: TaskResultStatus,
    enqueued_at: datetime | None,
    started_at: datetime | None,
    finished_at: datetime | None,
    args: list[Any],
    kwargs: dict[str, Any],
    backend: str,
    errors: list[TaskError],
    worker_ids: list[str],
    return_value: Any,
) -> AnyResult:
    """
    Return a TaskResult with these values; `args`, `kwargs` and `return_value` must be normalized.

    If a Django version has other fields, this function calls the constructor, which is slower. A
    test then fails, because a new field may need a value.
    """
    if _setters is None:
        task_result: AnyResult = TaskResult(
            task=task,
            id=id,
            status=status,
            enqueued_at=enqueued_at,
            started_at=started_at,
            finished_at=finished_at,
            last_attempted_at=started_at,
            args=args,
            kwargs=kwargs,
            backend=backend,
            errors=errors,
            worker_ids=worker_ids,
        )
        # Django's own backends set the fields of this frozen class in the same way.
        object.__setattr__(task_result, "_return_value", return_value)
        return task_result
    (
        set_task, set_id, set_status, set_enqueued_at, set_started_at, set_finished_at,
        set_last_attempted_at, set_args, set_kwargs, set_backend, set_errors, set_worker_ids,
        set_return_value,
    ) = _setters  # fmt: skip
    task_result = object.__new__(TaskResult)
    set_task(task_result, task)
    set_id(task_result, id)
    set_status(task_result, status)
    set_enqueued_at(task_result, enqueued_at)
    set_started_at(task_result, started_at)
    set_finished_at(task_result, finished_at)
    set_last_attempted_at(task_result, started_at)
    set_args(task_result, args)
    set_kwargs(task_result, kwargs)
    set_backend(task_result, backend)
    set_errors(task_result, errors)
    set_worker_ids(task_result, worker_ids)
    set_return_value(task_result, return_value)
    return task_result
