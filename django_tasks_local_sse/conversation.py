"""Decide what one stream sends: the initial states, updates, and a recheck after silence."""

from __future__ import annotations

from typing import TYPE_CHECKING

from django_tasks_local.events import NO_VERSION

from . import encoding

if TYPE_CHECKING:
    from collections.abc import Iterable

    from django_tasks_local.events import TaskEvent

    from .access import RefKey, TaskRef
    from .conf import SSESettings


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
        self._open = set(self._refs)  # The tasks that are neither finished nor unknown.
        self._last_event_id = last_event_id
        self._versions = dict.fromkeys(self._refs, NO_VERSION)  # The versions that were sent last.

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
            return message  # The client has received these states on an earlier connection.
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
