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

from django.http import StreamingHttpResponse

from django_tasks_local import signal_handlers
from django_tasks_local.hub import hub
from django_tasks_local.lookup import afind_newest_event, find_newest_event

from .request_thread import release_request_thread

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from django_tasks_local.events import TaskEvent

    from .access import RefKey, TaskRef
    from .conversation import Conversation


# Seconds after which the server ends a stream. The browser reconnects by itself, and its access is
# checked again: the user may have logged out, the link may be too old, and the channel manager may
# decide differently.
MAX_STREAM_SECONDS = 300.0


def find_events(refs: Iterable[TaskRef]) -> dict[RefKey, TaskEvent]:
    """Return the present state of the tasks that the client may see and that are known."""
    found = {}
    for ref in refs:
        if ref.alias is not None:
            event = find_newest_event(ref.id, ref.alias)
            if event is not None:
                found[ref.key] = event
    return found


async def afind_events(refs: Iterable[TaskRef]) -> dict[RefKey, TaskEvent]:
    """See find_events()."""
    found = {}
    for ref in refs:
        if ref.alias is not None:
            event = await afind_newest_event(ref.id, ref.alias)
            if event is not None:
                found[ref.key] = event
    return found


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
    # The view runs in a thread under ASGI; here, in the event loop, this is the main thread.
    signal_handlers.install_signal_handlers()
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
    found = await afind_events(conversation.open_refs)
    await release_request_thread()
    return found


def stream_sync(conversation: Conversation, hold: float) -> Iterator[bytes]:
    """
    Send the states of the tasks, then each change in the next `hold` seconds.

    Under WSGI a stream occupies a worker, so it ends early, and EventSource reconnects: polling
    with the same client and the same URL.
    """
    signal_handlers.install_signal_handlers()
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
                found = find_events(conversation.open_refs)
                yield conversation.recheck(found, subscription.take(timeout=0))


def _max_seconds() -> float:
    # Random, so that streams that started together after a restart reconnect at different times.
    return MAX_STREAM_SECONDS * random.uniform(0.8, 1)  # noqa: S311 - no secret
