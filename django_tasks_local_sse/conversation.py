"""Decide what one stream sends: the initial states, updates, and a recheck after silence."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

from django_tasks_local.events import NO_VERSION
from django_tasks_local.lookup import publishes_every_event

from . import encoding
from .access import Denial

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from django_tasks_local.aliases import TaskKey
    from django_tasks_local.events import TaskEvent

    from .access import TaskRef
    from .conf import SSESettings

    # The newest state of each task; None for a task that does not exist. A task whose store raised
    # an error, and of which the hub has no state, is missing.
    type FoundEvents = dict[TaskKey, TaskEvent | None]


class Conversation:
    """
    Holds which state of each task a stream has sent, and returns the bytes that it must send next.

    A task is open while the stream may still send a state of it: it is neither finished nor
    unknown.
    """

    def __init__(self, refs: Sequence[TaskRef], last_event_id: str, settings: SSESettings) -> None:
        self.settings = settings
        # The client may see these tasks.
        self.refs = {ref.key: ref for ref in refs if ref.allowed}
        self._denials = {ref.key: ref.denial for ref in refs if ref.denial is not None}
        self._tasks = len(self.refs) + len(self._denials)
        self._open = set(self.refs)
        self._last_event_id = last_event_id
        self._versions = dict.fromkeys(self.refs, NO_VERSION)  # The versions that were sent last.
        self._hashes: dict[TaskKey, int] = {}  # The hashes of the states that were sent last.
        self._sum = 0  # The sum of `_hashes`, from which the id of an event is made.
        self._is_new = True  # The next event is the first one of this stream.
        # The time, in seconds since the epoch, at which each token needs a successor.
        self._renewal_times = {
            key: renewal
            for key, ref in self.refs.items()
            if (renewal := ref.renewal_time(settings.token_max_age)) < math.inf
        }
        # The first of these times; renewed_tokens() returns nothing before it.
        self.next_renewal = min(self._renewal_times.values(), default=math.inf)

    @property
    def ended(self) -> bool:
        """Whether no further event will be sent."""
        return not self._open

    @property
    def is_reconnect(self) -> bool:
        """Whether the client has received events of an earlier stream."""
        return bool(self._last_event_id)

    @property
    def open_refs(self) -> list[TaskRef]:
        """The tasks of which the stream may still send a state."""
        return [self.refs[key] for key in self._open]

    def greeting(self) -> bytes:
        """Return the first line: a comment with the seconds between two keep-alive comments."""
        return b": keepalive=%g\n" % self.settings.keepalive

    def uncertain_refs(self, events: Iterable[TaskEvent]) -> list[TaskRef]:
        """
        Return the tasks whose state only a store knows; `events` are those of the hub.

        They are tasks of other backends, which may run in another process.
        """
        ended = {event.key for event in events if event.is_last}
        return [
            ref
            for key, ref in self.refs.items()
            if key not in ended and not publishes_every_event(ref.alias)
        ]

    def initial(self, events: Iterable[TaskEvent], found: FoundEvents | None = None) -> bytes:
        """
        Return the states of all tasks, or none if the client has received the same states before.

        `events` are the states in the hub, `found` those in the stores. A task without a state is
        unknown. uncertain_refs() that are missing in `found` are left out, until recheck().
        """
        found = found or {}
        states = {event.key: event for event in events}
        skipped = {ref.key for ref in self.uncertain_refs(states.values())} - found.keys()
        states.update((key, event) for key, event in found.items() if event is not None)
        missing = self.refs.keys() - states.keys() - skipped
        content = self._encode(
            [event for event in states.values() if event.key not in skipped],
            self._denials | dict.fromkeys(missing, Denial.UNKNOWN),
        )
        if self._open and not skipped and self._last_event_id == self._event_id():
            self._is_new = True
            content = b""
        return content + self.renewed_tokens()

    def update(self, events: Iterable[TaskEvent]) -> bytes:
        """Return the states that are later than those that were sent; b"" if there is none."""
        later = [event for event in events if event.version > self._versions[event.key]]
        if self._tasks == len(later) == 1 and not self._is_new:
            return self._encode_alone(later[0])
        return self._encode(later, {})

    def recheck(self, found: FoundEvents, events: Iterable[TaskEvent]) -> bytes:
        """
        Return the later states after the stores were asked; b"" if there is none.

        `found` are the states in the stores, `events` those that the hub has published since. An
        open task that has no state in either is reported as unknown.
        """
        states = {key: event for key, event in found.items() if event is not None}
        for event in events:
            if event.key not in states or event.version > states[event.key].version:
                states[event.key] = event
        unknown = self._open & found.keys() - states.keys()
        later = [e for e in states.values() if e.version > self._versions[e.key]]
        return self._encode(later, dict.fromkeys(unknown, Denial.UNKNOWN))

    def renewed_tokens(self) -> bytes:
        """Return a new token for each unfinished task whose token has used half of its time."""
        if time.time() < self.next_renewal:
            return b""
        messages = []
        for key, renewal in self._renewal_times.items():
            if key in self._open and time.time() >= renewal:
                messages.append(encoding.encode_token(key, self.refs[key].renewed_token()))
                self._renewal_times[key] = time.time() + self.settings.token_max_age / 2
        self.next_renewal = min(
            (renewal for key, renewal in self._renewal_times.items() if key in self._open),
            default=math.inf,
        )
        return b"".join(messages)

    def _encode_alone(self, event: TaskEvent) -> bytes:
        """Return the bytes of _encode() for the most frequent stream, that of one task: cached."""
        self._versions[event.key] = event.version
        if event.is_last:
            self._open.clear()
        return encoding.encode_alone(event, self.settings)

    def _encode(self, events: Iterable[TaskEvent], denials: Mapping[TaskKey, Denial]) -> bytes:
        messages = []
        for key, denial in denials.items():
            messages.append(encoding.encode_denied(key, denial))
            self._replace_hash(key, encoding.denied_hash(key, denial))
            self._open.discard(key)
        for event in events:
            messages.append(encoding.encode(event, self.settings))
            self._replace_hash(event.key, encoding.state_hash(event))
            self._versions[event.key] = event.version
            if event.is_last:
                self._open.discard(event.key)
        if not messages:
            return b""
        # Only the last event has an id. A client that loses the connection before this event sends
        # an older id when it reconnects, and so receives all of these events again.
        messages[-1] = encoding.with_id(self._event_id(), messages[-1])
        if self._is_new:
            # `retry:` has no block of its own: some clients take a block without data for an event.
            messages.insert(0, b"retry: %d\n" % max(1, round(self.settings.retry * 1000)))
            self._is_new = False
        return b"".join(messages)

    def _replace_hash(self, key: TaskKey, hash: int) -> None:
        self._sum += hash - self._hashes.get(key, 0)
        self._hashes[key] = hash

    def _event_id(self) -> str:
        if self.ended:
            return encoding.end_id([*self.refs, *self._denials])
        return encoding.state_id(self._sum)
