"""A task, and receivers that bind a variable around it, as django-structlog binds its context."""

from contextvars import ContextVar
from typing import Any

from django.tasks import task

from django_tasks_local import in_worker_process
from django_tasks_local.signals import task_postrun, task_prerun

bound: ContextVar[str] = ContextVar("bound")
ended: list[tuple[str, str]] = []


def bind(sender: Any, task_result: Any, **kwargs: Any) -> None:
    """Bind the id of the task that begins."""
    bound.set(f"{sender.name} {task_result.id} {task_result.status}")


def note_end(sender: Any, task_result: Any, **kwargs: Any) -> None:
    """Note which task has ended, and what was bound."""
    ended.append((task_result.id, bound.get()))


def connect() -> None:
    """Connect the receivers in this process."""
    task_prerun.connect(bind)
    task_postrun.connect(note_end)


def disconnect() -> None:
    """Disconnect the receivers in this process."""
    task_prerun.disconnect(bind)
    task_postrun.disconnect(note_end)


if in_worker_process():
    connect()


@task
def read_bound(fails: bool = False) -> list[Any]:
    """Return what a receiver has bound in the context of this task, and the ends before it."""
    if fails:
        raise ValueError(bound.get())
    return [bound.get(), ended.copy()]


@task
async def read_bound_async() -> list[Any]:
    """Return what a receiver has bound in the context of this task, and the ends before it."""
    return [bound.get(), ended.copy()]
