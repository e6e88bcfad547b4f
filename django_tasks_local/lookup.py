"""The newest known state of a task: the hub's, or that of its backend's store if it is later."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django.tasks import task_backends
from django.tasks.exceptions import InvalidTaskBackend, TaskResultDoesNotExist

from .hub import hub
from .publishing import event_from_result

if TYPE_CHECKING:
    from .aliases import AnyResult
    from .events import TaskEvent


def newest_event(task_result: AnyResult) -> TaskEvent:
    """
    Return the state of a task: the hub's event, or the given result's if that is later.

    The hub's event has more detail, but of a task that runs in another process this hub knows only
    that it was enqueued.
    """
    event = hub.snapshot(task_result)
    is_local = _publishes_every_event(task_result.backend)
    if event is not None and (is_local or event.is_last):
        return event
    run = int(task_result.started_at is not None) if is_local else None
    stored = event_from_result(task_result, run=run)
    return stored if event is None or stored.version > event.version else event


async def afind_newest_event(id: str, alias: str) -> TaskEvent | None:
    """
    Return the state of a task of the backend `alias`, or None if neither hub nor store knows it.

    Asks the backend's store unless the backend publishes every event in this process itself. Called
    in an event loop.
    """
    event = hub.snapshot(id, alias)
    if _publishes_every_event(alias) or (event is not None and event.is_last):
        return event
    try:
        backend = task_backends[alias]
        if not backend.supports_get_result:
            return event
        return newest_event(await backend.aget_result(id))
    except (InvalidTaskBackend, TaskResultDoesNotExist):
        return event


def _publishes_every_event(alias: str) -> bool:
    """Whether this backend runs its tasks in this process and publishes all of their events."""
    try:
        return getattr(task_backends[alias], "publishes_events", False)
    except InvalidTaskBackend:
        return False
