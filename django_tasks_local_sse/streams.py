"""
The content of one stream, and the two loops that send it: async under ASGI, sync under WSGI.

Every stream begins with the state of each of its tasks, so a client that reconnects needs no
history.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from django.http import StreamingHttpResponse

from django_tasks_local import signal_handlers
from django_tasks_local.clocks import Clocks
from django_tasks_local.hub import hub
from django_tasks_local.logs import get_logger
from django_tasks_local.lookup import afind_newest_event, find_newest_event
from django_tasks_local.pubsub.subscription import Subscription

from . import encoding
from .rare_warnings import RareWarnings
from .request_thread import release_request_thread

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .access import TaskRef
    from .conf import SSESettings
    from .conversation import Conversation, FoundEvents

# Seconds after which the server ends a stream. The browser reconnects by itself, and its access is
# checked again: the user may have logged out, the link may be too old, and the channel manager may
# decide differently.
MAX_STREAM_SECONDS = 300.0

# The streams that this process sends or is about to send. The set is weak, because Django drops a
# response without closing it if the client disconnects before the view has returned.
open_streams: WeakSet[Conversation] = WeakSet()

_warnings = RareWarnings(get_logger(__name__))


def find_events(refs: Iterable[TaskRef]) -> FoundEvents:
    """Return the newest states of tasks that the client may see."""
    found: FoundEvents = {}
    for ref in refs:
        try:
            found[ref.key] = find_newest_event(ref.id, ref.alias)
        except Exception as error:  # noqa: BLE001 - a backend may raise anything
            _use_hub_only(found, ref, error)
    return found


async def afind_events(refs: Iterable[TaskRef]) -> FoundEvents:
    """Return the same as find_events(), without blocking the event loop."""
    found: FoundEvents = {}
    for ref in refs:
        try:
            found[ref.key] = await afind_newest_event(ref.id, ref.alias)
        except Exception as error:  # noqa: BLE001 - a backend may raise anything
            _use_hub_only(found, ref, error)
    return found


def _use_hub_only(found: FoundEvents, ref: TaskRef, error: Exception) -> None:
    """Log the error of a store; if the hub has a state of the task, add it to `found`."""
    event = hub.snapshot(ref.id, ref.alias)
    if event is not None:
        found[ref.key] = event
    _warnings.warn(
        ref.alias,
        "The state of task id=%s cannot be read from the task backend %r: %s: %s",
        ref.id,
        ref.alias,
        type(error).__name__,
        error,
    )


class EventStreamResponse(StreamingHttpResponse):
    """
    A stream that the server closes when the client disconnects.

    Django would wrap our generator in two of its own. They add a tenth to the cost of each event,
    and when they are closed, our generator stays open until the garbage collector finds it.
    """

    def __init__(
        self,
        content: AsyncIterator[bytes] | Iterator[bytes],
        conversation: Conversation,
        **kwargs: Any,
    ) -> None:
        super().__init__(content, **kwargs)
        self._content = content
        self._conversation = conversation

    def close(self) -> None:
        """Close the response; its stream is then no longer counted, even if it never started."""
        super().close()
        open_streams.discard(self._conversation)

    def __aiter__(self) -> AsyncIterator[bytes]:
        if vars(self)["_iterator"] is self._content and isinstance(self._content, AsyncIterator):
            return self._content
        return super().__aiter__()  # A middleware has replaced our generator.


async def stream_async(conversation: Conversation) -> AsyncIterator[bytes]:
    """Send the states of the tasks, then each change until the stream ends. Occupies no thread."""
    # The view runs in a thread under ASGI; here, in the event loop, this is the main thread.
    signal_handlers.install_signal_handlers()
    try:
        await release_request_thread()
        schedule = _Schedule(conversation.settings, _max_seconds())
        async with Subscription(hub, tuple(conversation.refs)) as subscription:
            events = await subscription.atake(timeout=0)
            uncertain = conversation.uncertain_refs(events)
            if uncertain and conversation.is_reconnect:
                yield conversation.greeting()
                yield conversation.initial(events, await _afind_again(uncertain))
            else:
                yield conversation.greeting() + conversation.initial(events)
                if uncertain:
                    found = await _afind_again(uncertain)
                    yield conversation.recheck(found, await subscription.atake(timeout=0))
            while not conversation.ended and not schedule.is_over():
                events = await subscription.atake(timeout=schedule.timeout(conversation))
                if events:
                    schedule.postpone_recheck()
                    content = conversation.update(events)
                elif subscription.ended:
                    return  # This process is about to exit; the client reconnects to the next one.
                elif schedule.recheck_is_due():
                    found = await _afind_again(conversation.open_refs)
                    await asyncio.sleep(0)  # Deliveries that the hub has scheduled come first.
                    content = conversation.recheck(found, await subscription.atake(timeout=0))
                    schedule.postpone_recheck()
                else:
                    content = b""
                content += conversation.renewed_tokens()
                if content or schedule.keepalive_is_due():
                    yield content or encoding.KEEPALIVE
                    schedule.postpone_keepalive()
    finally:
        open_streams.discard(conversation)


async def _afind_again(refs: Iterable[TaskRef]) -> FoundEvents:
    """Ask the stores for the states of tasks, which may run in another process."""
    found = await afind_events(refs)
    await release_request_thread()
    return found


def stream_sync(conversation: Conversation, hold: float) -> Iterator[bytes]:
    """
    Send the states of the tasks, then each change in the next `hold` seconds.

    Under WSGI a stream occupies a worker, so it ends early, and EventSource reconnects: polling
    with the same client and the same URL.
    """
    signal_handlers.install_signal_handlers()
    try:
        schedule = _Schedule(conversation.settings, min(hold, _max_seconds()))
        with Subscription(hub, tuple(conversation.refs)) as subscription:
            events = subscription.take(timeout=0)
            uncertain = conversation.uncertain_refs(events)
            if uncertain and conversation.is_reconnect:
                yield conversation.greeting()
                yield conversation.initial(events, find_events(uncertain))
            else:
                yield conversation.greeting() + conversation.initial(events)
                if uncertain:
                    found = find_events(uncertain)
                    yield conversation.recheck(found, subscription.take(timeout=0))
            while not conversation.ended and not schedule.is_over():
                events = subscription.take(timeout=schedule.timeout(conversation))
                if events:
                    schedule.postpone_recheck()
                    content = conversation.update(events)
                elif subscription.ended:
                    return
                elif schedule.recheck_is_due():
                    found = find_events(conversation.open_refs)
                    content = conversation.recheck(found, subscription.take(timeout=0))
                    schedule.postpone_recheck()
                else:
                    content = b""
                content += conversation.renewed_tokens()
                if content or schedule.keepalive_is_due():
                    yield content or encoding.KEEPALIVE
                    schedule.postpone_keepalive()
    finally:
        open_streams.discard(conversation)


class _Schedule:
    """The times at which a stream sends a comment, asks the stores again, and ends."""

    def __init__(self, settings: SSESettings, max_seconds: float) -> None:
        self._settings = settings
        self._end = Clocks.monotonic() + max_seconds
        self.postpone_keepalive()
        self.postpone_recheck()

    def postpone_keepalive(self) -> None:
        """Restart the time until the next comment, because the stream has sent something."""
        self._keepalive = Clocks.monotonic() + self._settings.keepalive

    def postpone_recheck(self) -> None:
        """Restart the time until the stores are asked, because a state is known to be new."""
        self._recheck = Clocks.monotonic() + self._settings.recheck_interval

    def timeout(self, conversation: Conversation) -> float:
        """Return the seconds that the stream may wait for an event."""
        left = min(self._end, self._keepalive, self._recheck) - Clocks.monotonic()
        if conversation.next_renewal < math.inf:
            left = min(left, conversation.next_renewal - time.time())
        return max(0, left)

    def is_over(self) -> bool:
        """Whether the stream must end."""
        return Clocks.monotonic() >= self._end

    def keepalive_is_due(self) -> bool:
        """Whether nothing was sent for KEEPALIVE seconds."""
        return Clocks.monotonic() >= self._keepalive

    def recheck_is_due(self) -> bool:
        """Whether no event came for RECHECK_INTERVAL seconds."""
        return Clocks.monotonic() >= self._recheck


def _max_seconds() -> float:
    # Random, so that streams that started together after a restart reconnect at different times.
    return MAX_STREAM_SECONDS * random.uniform(0.8, 1)  # noqa: S311 - no secret
