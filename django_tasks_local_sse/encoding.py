"""TaskEvent -> JSON payload -> the bytes of a server-sent event. No I/O, no state."""

from __future__ import annotations

import json
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from django.conf import settings as django_settings
from django.utils import timezone
from django.utils.crypto import salted_hmac
from django_eventstream.utils import sse_encode_event

from django_tasks_local.logs import get_logger

from .access import Denial

if TYPE_CHECKING:
    from collections.abc import Iterable
    from datetime import datetime

    from django_tasks_local.aliases import TaskKey
    from django_tasks_local.events import Progress, TaskEvent, TaskFailure

    from .conf import SSESettings

type Payload = dict[str, Any]

logger = get_logger(__name__)

_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}

KEEPALIVE = b":\n"  # A comment, without an empty line: some clients would take that for an event.

# Two kinds of payloads have no event: the task does not exist or may not be seen, or the link is no
# longer valid for this client.
UNKNOWN = "unknown"
REFUSED = "refused"
REFUSALS = {
    Denial.EXPIRED: "The link to this task is too old. Reload the page that contains it.",
    Denial.OTHER_USER: "The link to this task was made for another user.",
}
# The name of the event that replaces a token which has used half of its time.
TOKEN = "token"  # noqa: S105 - no secret


def payload(event: TaskEvent, settings: SSESettings) -> Payload:
    """Return the content of an event that EXPOSE_RESULTS and EXPOSE_ERRORS let a client see."""
    return {
        "backend": event.backend,
        "id": event.id,
        "run": event.run,
        "sequence": event.sequence,
        "kind": event.kind,
        "status": event.status,
        "name": event.name,
        "position": event.position,
        "retried_from": event.retried_from,
        "progress": event.progress and _progress(event.progress),
        "enqueued_at": _to_text(event.enqueued_at),
        "started_at": _to_text(event.started_at),
        "finished_at": _to_text(event.finished_at),
        "error": event.error and _error(event.error, settings.expose_errors),
        "result": _json_value(event.id, event.return_value) if settings.expose_results else None,
    }


def denied_payload(key: TaskKey, denial: Denial) -> Payload:
    """
    Return the payload for a task that is unknown, or whose link is refused.

    A task that does not exist and a task that the client may not see are indistinguishable on
    purpose.
    """
    reason = REFUSALS.get(denial)
    return {
        "backend": key[0],
        "id": key[1],
        "run": 0,
        "sequence": 0,
        "kind": UNKNOWN if reason is None else REFUSED,
        "status": None,
        "name": None,
        "position": None,
        "retried_from": None,
        "progress": None,
        "enqueued_at": None,
        "started_at": None,
        "finished_at": None,
        "error": reason and {"reason": denial, "type": None, "message": reason},
        "result": None,
    }


# Each event is encoded once for all streams. An entry lives as long as its event.
_encoded: WeakKeyDictionary[TaskEvent, dict[tuple[bool, ...], bytes]] = WeakKeyDictionary()


def encode(event: TaskEvent, settings: SSESettings) -> bytes:
    """Return a server-sent event without an id, which depends on the stream."""
    variants = _encoded.setdefault(event, {})
    variant = (settings.expose_results, settings.expose_errors)
    message = variants.get(variant)
    if message is None:
        message = variants[variant] = _encode(event.kind, payload(event, settings))
    return message


def encode_alone(event: TaskEvent, settings: SSESettings) -> bytes:
    """Return a server-sent event with the id that it has in a stream of its task alone."""
    variants = _encoded.setdefault(event, {})
    variant = (settings.expose_results, settings.expose_errors, True)
    message = variants.get(variant)
    if message is None:
        id = end_id([event.key]) if event.is_last else state_id(state_hash(event))
        message = variants[variant] = with_id(id, encode(event, settings))
    return message


def encode_denied(key: TaskKey, denial: Denial) -> bytes:
    """See encode()."""
    content = denied_payload(key, denial)
    return _encode(content["kind"], content)


def encode_token(key: TaskKey, token: str) -> bytes:
    """Return a server-sent event with a new token, which has no id: it changes no task."""
    return _encode(TOKEN, token_payload(key, token))


def token_payload(key: TaskKey, token: str) -> Payload:
    """Return the content of an event that replaces the token of a task."""
    return {"backend": key[0], "id": key[1], "token": token}


def with_id(event_id: str, message: bytes) -> bytes:
    """Return an encoded event with its id."""
    return b"id: " + event_id.encode("ascii") + b"\n" + message


# An entry lives as long as its event, as in _encoded.
_hashes: WeakKeyDictionary[TaskEvent, int] = WeakKeyDictionary()


def state_hash(event: TaskEvent) -> int:
    """Return the hash of one state of a task; a stream's id is the sum of these hashes."""
    hash = _hashes.get(event)
    if hash is None:
        hash = _hashes[event] = _hash(*event.key, event.version)
    return hash


def denied_hash(key: TaskKey, denial: Denial) -> int:
    """See state_hash()."""
    return _hash(*key, denial)


def state_id(hashes: int) -> str:
    """
    Return the id of an event after which the hashes of the tasks' states have this sum.

    With a sum, an event of one task costs one hash, however many tasks the stream has.
    """
    return f"{hashes % 2**128:032x}"


def end_id(keys: Iterable[TaskKey]) -> str:
    """Return the id of the last event of a stream of these tasks."""
    return f"end-{state_id(sum(_hash(*key) for key in keys))}"


def _hash(*values: Any) -> int:
    """Return a keyed hash of 128 bits: without the key no client can find two sums that agree."""
    text = repr(values).encode("utf-8", "replace")
    return int.from_bytes(
        blake2b(text, digest_size=16, key=_hash_key(django_settings.SECRET_KEY)).digest()
    )


@lru_cache(maxsize=1)
def _hash_key(secret: str | bytes) -> bytes:
    return salted_hmac("django_tasks_local_sse.id", "", secret=secret, algorithm="sha256").digest()


def to_json(content: Payload) -> str:
    """Return a payload as JSON without NaN, in one line for every reader of lines."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # These characters end no line of a server-sent event, but str.splitlines() splits at them, and
    # clients use it.
    for character, escape in _LINE_ENDS.items():
        text = text.replace(character, escape)
    # A lone surrogate in a message cannot be encoded as UTF-8; it becomes "?", because an exception
    # would end the stream.
    return text.encode("utf-8", "replace").decode()


def _encode(kind: str, content: Payload) -> bytes:
    encoded: bytes = sse_encode_event(kind, to_json(content)).encode()
    return encoded


def _progress(progress: Progress) -> Payload:
    return {
        "current": progress.current,
        "total": progress.total,
        "percent": progress.percent,
        "message": progress.message,
        "unit": progress.unit,
        "data": progress.data,
        "levels": progress.levels,
        "rate": progress.rate,
        "eta": progress.eta,
    }


def _error(error: TaskFailure, expose: bool) -> Payload:
    return {
        "reason": error.reason,
        "type": error.type if expose else None,
        "message": error.message if expose else None,
    }


def _to_text(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    if timezone.is_naive(moment):  # USE_TZ is off; a browser would read it as a time in its zone.
        moment = timezone.make_aware(moment)
    return moment.isoformat()


def _json_value(result_id: str, value: Any) -> Any:
    """Return a value with None for NaN and infinity: Django allows them, and JSON has none."""
    try:
        return json.loads(json.dumps(value), parse_constant=lambda constant: None)
    except (TypeError, ValueError) as error:
        logger.warning("Task id=%s: its return value is not sent to clients: %s", result_id, error)
        return None
