"""
The content of one stream, and the two loops that send it: async under ASGI, sync under WSGI.

Every stream begins with the state of each of its tasks, so a client that reconnects needs no
history.
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

from django_tasks_local.events import NO_VERSION
from django_tasks_local.hub import hub
from django_tasks_local.lookup import afind_newest_event

from . import encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from django_tasks_local.events import TaskEvent

    from .access import RefKey, TaskRef
    from .conf import SSESettings


# Seconds after which the server ends a stream. The browser reconnects by itself, and its access is
# checked again: the user may have logged out, the link may be too old, and the channel manager may
# decide differently.
MAX_STREAM_SECONDS = 300.0


async def find_events(refs: Iterable[TaskRef]) -> dict[RefKey, TaskEvent]:
    """Return the present state of the tasks that the client may see and that are known."""
    found = {}
    for ref in refs:
        if ref.alias is not None:
            event = await afind_newest_event(ref.id, ref.alias)
            if event is not None:
                found[ref.key] = event
    return found


class Conversation:
    """
    The state of one stream: which version of each task was sent.

    `found` are the states that the view has found; a task without one is reported as unknown.
    """

    def __init__(
        self,
        refs: Iterable[TaskRef],
        found: dict[RefKey, TaskEvent],
        last_event_id: str,
        settings: SSESettings,
    ) -> None:
        self.settings = settings
        self.found = found
        self._refs = {ref.key: ref for ref in refs}
        self._open = set(self._refs)  # neither finished nor unknown
        self._last_event_id = last_event_id
        self._versions = dict.fromkeys(self._refs, NO_VERSION)  # of the last event sent

    @property
    def ended(self) -> bool:
        """Whether no further event will be sent."""
        return not self._open

    @property
    def open_refs(self) -> list[TaskRef]:
        """The tasks that are neither finished nor unknown."""
        return [self._refs[key] for key in self._open]

    def initial(self, events: Iterable[TaskEvent] = ()) -> bytes:
        """Return the state of every task: the one `found`, or the hub's if that is later."""
        states = dict(self.found)
        for event in events:
            if event.version > states[event.key].version:
                states[event.key] = event
        message = f"retry: {self.settings.retry}\n\n".encode()
        encoded = self._encode(states.values(), [key for key in self._refs if key not in states])
        if self._open and self._last_event_id == encoding.state_digest(self._versions):
            return message  # The client has all of this.
        return message + encoded

    def update(self, events: Iterable[TaskEvent], unknown: Iterable[RefKey] = ()) -> bytes:
        """Return the changed states, or a comment that keeps the connection alive."""
        later = [event for event in events if event.version > self._versions[event.key]]
        if len(self._refs) == len(later) == 1:
            return self._encode_alone(later[0])
        return self._encode(later, unknown) or encoding.KEEPALIVE

    def recheck(self, found: dict[RefKey, TaskEvent], events: Iterable[TaskEvent]) -> bytes:
        """
        Return the update after a quiet period.

        `found` are the states that the stores returned, `events` those that the hub published
        since. Tasks that are in neither are reported as unknown.
        """
        states = dict(found)
        for event in events:
            if event.key not in states or event.version > states[event.key].version:
                states[event.key] = event
        unknown = [ref.key for ref in self.open_refs if ref.key not in states]
        return self.update(states.values(), unknown)

    def _encode_alone(self, event: TaskEvent) -> bytes:
        """Return the bytes of _encode() for the most frequent stream, that of one task: cached."""
        self._versions[event.key] = event.version
        if event.is_last:
            self._open.clear()
        return encoding.encode_alone(event, self.settings)

    def _encode(self, events: Iterable[TaskEvent], unknown: Iterable[RefKey]) -> bytes:
        messages = [encoding.encode_unknown(id) for _, id in unknown]
        self._open.difference_update(unknown)
        for event in events:
            messages.append(encoding.encode(event, self.settings))
            self._versions[event.key] = event.version
            if event.is_last:
                self._open.discard(event.key)
        if messages:
            # Only the last event carries the id, so that a client that loses the connection before
            # it receives all of these events again.
            messages[-1] = encoding.with_id(self._event_id(), messages[-1])
        return b"".join(messages)

    def _event_id(self) -> str:
        if self.ended:
            return encoding.end_id({id for _, id in self._refs})
        return encoding.state_digest(self._versions)


class EventStreamResponse(StreamingHttpResponse):
    """
    A stream that the server closes when the client disconnects.

    Django would wrap our generator in two of its own. They add a tenth to the cost of each event,
    and when they are closed, our generator stays open until the garbage collector finds it.
    """

    def __init__(self, content: AsyncIterator[bytes] | Iterator[bytes], **kwargs: Any) -> None:
        super().__init__(content, **kwargs)
        self._content = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        if vars(self)["_iterator"] is self._content and isinstance(self._content, AsyncIterator):
            return self._content
        return super().__aiter__()  # A middleware has replaced our generator.


async def stream_async(conversation: Conversation) -> AsyncIterator[bytes]:
    """Send the states of the tasks, then each change until the stream ends. Occupies no thread."""
    await release_request_thread()
    if not conversation.found:  # Without ids, subscribe() would mean every task.
        yield conversation.initial()
        return
    deadline = time.monotonic() + _max_seconds()
    async with hub.subscribe(*conversation.found.values()) as subscription:
        yield conversation.initial(await subscription.atake(timeout=0))
        while not conversation.ended and (left := deadline - time.monotonic()) > 0:
            events = await subscription.atake(timeout=min(left, conversation.settings.keepalive))
            if events:
                yield conversation.update(events)
            elif subscription.ended:
                return  # This process is about to exit; the client reconnects to the next one.
            else:
                found = await _find_again(conversation)
                await asyncio.sleep(0)  # Deliveries that the hub has scheduled come first.
                yield conversation.recheck(found, await subscription.atake(timeout=0))


async def _find_again(conversation: Conversation) -> dict[RefKey, TaskEvent]:
    """Ask the stores for the states of the open tasks: they may run in another process."""
    found = await find_events(conversation.open_refs)
    await release_request_thread()
    return found


def stream_sync(conversation: Conversation, hold: float) -> Iterator[bytes]:
    """
    Send the states of the tasks, then each change in the next `hold` seconds.

    Under WSGI a stream occupies a worker, so it ends early, and EventSource reconnects: polling
    with the same client and the same URL.
    """
    if not conversation.found:
        yield conversation.initial()
        return
    deadline = time.monotonic() + min(hold, _max_seconds())
    with hub.subscribe(*conversation.found.values()) as subscription:
        yield conversation.initial(subscription.take(timeout=0))
        while not conversation.ended and (left := deadline - time.monotonic()) > 0:
            events = subscription.take(timeout=min(left, conversation.settings.keepalive))
            if events:
                yield conversation.update(events)
            elif subscription.ended:
                return
            else:
                found = async_to_sync(_find_again)(conversation)
                yield conversation.recheck(found, subscription.take(timeout=0))


def _max_seconds() -> float:
    # Random, so that streams that started together after a restart reconnect at different times.
    return MAX_STREAM_SECONDS * random.uniform(0.8, 1)  # noqa: S311 - no secret


async def release_request_thread() -> None:
    """
    Give back the thread that Django holds for this request, and its database connections.

    Django's ASGI handler creates an executor with one thread for each request and keeps it until
    the response ends, up to MAX_STREAM_SECONDS here. Code that needs a thread later gets a new one
    automatically. Outside of such a request, as under Django's AsyncClient, this does nothing: the
    connections there belong to the caller.
    """
    context = SyncToAsync.thread_sensitive_context.get(None)
    if context is None or context not in SyncToAsync.context_to_thread_executor:
        return
    await sync_to_async(connections.close_all)()
    executor = SyncToAsync.context_to_thread_executor.pop(context, None)
    if executor is not None:
        executor.shutdown(wait=False)
