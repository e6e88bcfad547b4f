"""This module finds the newest known state of a task, in the hub or in its backend's store."""

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
    Return the hub's event of a task, or an event made from `task_result` if that is later.

    The hub's event also has the progress. But if the task runs in another process, the hub of this
    process may only have its `enqueued` event.
    """
    event = hub.snapshot(task_result)
    is_local = publishes_every_event(task_result.backend)
    if event is not None and (is_local or event.is_last):
        return event
    run = int(task_result.started_at is not None) if is_local else None
    retried_from = None if event is None else event.retried_from
    stored = event_from_result(task_result, run=run, retried_from=retried_from)
    return stored if event is None or stored.version > event.version else event


def find_newest_event(id: str, alias: str) -> TaskEvent | None:
    """
    Return the newest event of a task of the backend `alias`; None if hub and store have no state.

    Reads the backend's store, unless the hub has the last event already or the backend publishes
    all of its events in this process.
    """
    event = hub.snapshot(id, alias)
    if _is_newest(event, alias):
        return event
    try:
        backend = task_backends[alias]
        return newest_event(backend.get_result(id)) if backend.supports_get_result else event
    except (InvalidTaskBackend, TaskResultDoesNotExist):
        return event


async def afind_newest_event(id: str, alias: str) -> TaskEvent | None:
    """See find_newest_event()."""
    event = hub.snapshot(id, alias)
    if _is_newest(event, alias):
        return event
    try:
        backend = task_backends[alias]
        return newest_event(await backend.aget_result(id)) if backend.supports_get_result else event
    except (InvalidTaskBackend, TaskResultDoesNotExist):
        return event


def _is_newest(event: TaskEvent | None, alias: str) -> bool:
    """Return whether the store of the backend `alias` has no newer state than the hub's `event`."""
    return publishes_every_event(alias) or (event is not None and event.is_last)


def publishes_every_event(alias: str) -> bool:
    """Return whether this backend publishes all events of its tasks in this process."""
    try:
        return getattr(task_backends[alias], "publishes_events", False)
    except InvalidTaskBackend:
        return False
