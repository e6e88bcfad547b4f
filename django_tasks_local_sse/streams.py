"""
What one connection is told, and the two loops that tell it: async under ASGI, sync under WSGI.

Every connection begins with the state of every task, so nothing depends on history.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from asgiref.sync import SyncToAsync, async_to_sync, sync_to_async
from django.db import connections
from django.http import StreamingHttpResponse
from django.tasks import task_backends
from django.tasks.exceptions import InvalidTaskBackend, TaskResultDoesNotExist

from django_tasks_local.backends import LocalBackend
from django_tasks_local.events import NO_VERSION
from django_tasks_local.hub import hub
from django_tasks_local.lifecycle import later_state

from . import encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from django_tasks_local.events import TaskEvent

    from .access import TaskRef
    from .conf import SSESettings


# Seconds, at most. The browser comes back by itself and is looked at again: it may have logged out,
# its link may be too old, and the channel manager may have changed its mind.
LONGEST_STREAM = 300.0


async def find_events(refs: Iterable[TaskRef]) -> dict[str, TaskEvent]:
    """Return the present state of those of the tasks that may be seen and are known."""
    found = {}
    for ref in refs:
        if ref.alias is not None:
            event = await _find_event(ref.id, ref.alias)
            if event is not None:
                found[ref.id] = event
    return found


async def _find_event(result_id: str, alias: str) -> TaskEvent | None:
    event = hub.snapshot(result_id)
    if event is not None and event.is_last:
        return event
    try:
        backend = task_backends[alias]
        if isinstance(backend, LocalBackend) or not backend.supports_get_result:
            return event
        # The task may run in another process, and this one has heard nothing since `enqueued`.
        return later_state(await backend.aget_result(result_id))
    except (InvalidTaskBackend, TaskResultDoesNotExist):
        return event


class Conversation:
    """
    What one client has been told so far.

    `found` are the states that the view has found; a task that was not found is unknown.
    """

    def __init__(
        self,
        refs: Iterable[TaskRef],
        found: dict[str, TaskEvent],
        last_event_id: str,
        settings: SSESettings,
    ) -> None:
        self.settings = settings
        self.found = found
        self._refs = {ref.id: ref for ref in refs}
        self._open = set(self._refs)  # neither finished nor unknown
        self._last_event_id = last_event_id
        self._versions = dict.fromkeys(self._refs, NO_VERSION)  # told last

    @property
    def ended(self) -> bool:
        """Whether there is nothing more to tell."""
        return not self._open

    @property
    def open_refs(self) -> list[TaskRef]:
        """The tasks of which there is more to tell."""
        return [self._refs[result_id] for result_id in self._open]

    def opening(self, events: Iterable[TaskEvent] = ()) -> bytes:
        """Return the state of every task: what was `found`, or what the hub says, if later."""
        states = dict(self.found)
        for event in events:
            if event.version > states[event.id].version:
                states[event.id] = event
        message = f"retry: {self.settings.retry}\n\n".encode()
        told = self._tell(states.values(), [id for id in self._refs if id not in states])
        if self._open and self._last_event_id == encoding.state_digest(self._versions):
            return message  # The client has all of this.
        return message + told

    def news(self, events: Iterable[TaskEvent], unknown: Iterable[str] = ()) -> bytes:
        """Return what has changed, or a comment that keeps the connection alive."""
        later = [event for event in events if event.version > self._versions[event.id]]
        if len(self._refs) == len(later) == 1:
            return self._tell_alone(later[0])
        return self._tell(later, unknown) or encoding.KEEPALIVE

    def after_silence(self, found: dict[str, TaskEvent], events: Iterable[TaskEvent]) -> bytes:
        """Return what was `found`, or has come since; a task of which there is neither is gone."""
        states = dict(found)
        for event in events:
            if event.id not in states or event.version > states[event.id].version:
                states[event.id] = event
        gone = [ref.id for ref in self.open_refs if ref.id not in states]
        return self.news(states.values(), gone)

    def _tell_alone(self, event: TaskEvent) -> bytes:
        """See _tell(); most streams are of a single task, and are told the same."""
        self._versions[event.id] = event.version
        if event.is_last:
            self._open.clear()
        return encoding.encode_alone(event, self.settings)

    def _tell(self, events: Iterable[TaskEvent], unknown: Iterable[str]) -> bytes:
        messages = [encoding.encode_unknown(result_id) for result_id in unknown]
        self._open.difference_update(unknown)
        for event in events:
            messages.append(encoding.encode(event, self.settings))
            self._versions[event.id] = event.version
            if event.is_last:
                self._open.discard(event.id)
        if messages:
            # Only the last one carries the id, so that a client which lost the connection in
            # between is told all of it again.
            messages[-1] = encoding.with_id(self._event_id(), messages[-1])
        return b"".join(messages)

    def _event_id(self) -> str:
        if self.ended:
            return encoding.end_id(self._refs)
        return encoding.state_digest(self._versions)


class EventStreamResponse(StreamingHttpResponse):
    """
    A stream that the server closes when the client goes away.

    Django would iterate through two generators of its own. They cost each event a tenth, and when
    they are closed they leave ours to the garbage collector.
    """

    def __init__(self, content: AsyncIterator[bytes] | Iterator[bytes], **kwargs: Any) -> None:
        super().__init__(content, **kwargs)
        self._own = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        if vars(self)["_iterator"] is self._own and isinstance(self._own, AsyncIterator):
            return self._own
        return super().__aiter__()  # A middleware has put something else in its place.


async def stream_async(conversation: Conversation) -> AsyncIterator[bytes]:
    """Tell a client the states, and what changes, as long as it may last. Holds no thread."""
    await release_request_thread()
    if not conversation.found:  # Without ids, subscribe() would mean every task.
        yield conversation.opening()
        return
    deadline = time.monotonic() + _longest()
    async with hub.subscribe(*conversation.found) as subscription:
        yield conversation.opening(await subscription.atake(timeout=0))
        while not conversation.ended and (left := deadline - time.monotonic()) > 0:
            events = await subscription.atake(timeout=min(left, conversation.settings.keepalive))
            if events:
                yield conversation.news(events)
            elif subscription.ended:
                return  # This process is about to exit; the client will connect to the next.
            else:
                found = await _look(conversation)
                await asyncio.sleep(0)  # What the hub has scheduled in the meantime comes first.
                yield conversation.after_silence(found, await subscription.atake(timeout=0))


async def _look(conversation: Conversation) -> dict[str, TaskEvent]:
    """Look whether the silence is one of tasks that run elsewhere, or are gone."""
    found = await find_events(conversation.open_refs)
    await release_request_thread()
    return found


def stream_sync(conversation: Conversation, hold: float) -> Iterator[bytes]:
    """
    Tell a client the states, and what changes in the next `hold` seconds.

    Under WSGI a stream occupies a worker, so it ends early, and EventSource connects again: that is
    polling, with the same client and the same URL.
    """
    if not conversation.found:
        yield conversation.opening()
        return
    deadline = time.monotonic() + min(hold, _longest())
    with hub.subscribe(*conversation.found) as subscription:
        yield conversation.opening(subscription.take(timeout=0))
        while not conversation.ended and (left := deadline - time.monotonic()) > 0:
            events = subscription.take(timeout=min(left, conversation.settings.keepalive))
            if events:
                yield conversation.news(events)
            elif subscription.ended:
                return
            else:
                found = async_to_sync(_look)(conversation)
                yield conversation.after_silence(found, subscription.take(timeout=0))


def _longest() -> float:
    # Streams that began together, after a restart, are not to come back together for ever.
    return LONGEST_STREAM * random.uniform(0.8, 1)  # noqa: S311 - no secret


async def release_request_thread() -> None:
    """
    Give back the thread that Django holds for this request, and its database connections.

    Django's ASGI handler gives each request an executor with one thread and keeps it until the
    response ends, which for a stream is long. Whatever needs a thread later gets a new one by
    itself. Outside of such a request, as under Django's AsyncClient, nothing is done: connections
    there belong to somebody else.
    """
    context = SyncToAsync.thread_sensitive_context.get(None)
    if context is None or context not in SyncToAsync.context_to_thread_executor:
        return
    await sync_to_async(connections.close_all)()
    executor = SyncToAsync.context_to_thread_executor.pop(context, None)
    if executor is not None:
        executor.shutdown(wait=False)
