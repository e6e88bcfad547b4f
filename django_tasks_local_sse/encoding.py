"""TaskEvent -> JSON payload -> the bytes of a server-sent event. No I/O, no state."""

from __future__ import annotations

import hashlib
import json
import logging
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from django.utils import timezone
from django_eventstream.utils import sse_encode_event

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from datetime import datetime

    from django_tasks_local.events import Progress, TaskEvent, TaskFailure, Version

    from .access import RefKey
    from .conf import SSESettings

type Payload = dict[str, Any]

logger = logging.getLogger(__name__)

_LINE_ENDS = {"\x85": "\\u0085", "\u2028": "\\u2028", "\u2029": "\\u2029"}

UNKNOWN = "unknown"
KEEPALIVE = b":\n\n"  # A comment line: WHATWG HTML, section 9.2.7, "Authoring notes".


def payload(event: TaskEvent, settings: SSESettings) -> Payload:
    """Return the content of an event that EXPOSE_RESULTS and EXPOSE_ERRORS let a client see."""
    return {
        "id": event.id,
        "sequence": event.sequence,
        "kind": event.kind,
        "status": event.status,
        "name": event.name,
        "position": event.position,
        "progress": event.progress and _progress(event.progress),
        "enqueued_at": _to_text(event.enqueued_at),
        "started_at": _to_text(event.started_at),
        "finished_at": _to_text(event.finished_at),
        "error": event.error and _error(event.error, settings.expose_errors),
        "result": _json_value(event.id, event.return_value) if settings.expose_results else None,
    }


def unknown_payload(result_id: str) -> Payload:
    """
    Return the payload for a task that does not exist or that the client may not see.

    The two are indistinguishable on purpose.
    """
    return {
        "id": result_id,
        "sequence": 0,
        "kind": UNKNOWN,
        "status": None,
        "name": None,
        "position": None,
        "progress": None,
        "enqueued_at": None,
        "started_at": None,
        "finished_at": None,
        "error": None,
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
        id = end_id([event.id]) if event.is_last else state_digest({event.key: event.version})
        message = variants[variant] = with_id(id, encode(event, settings))
    return message


def encode_unknown(result_id: str) -> bytes:
    """Return the server-sent event `unknown`, without an id."""
    return _encode(UNKNOWN, unknown_payload(result_id))


def with_id(event_id: str, message: bytes) -> bytes:
    """Return an encoded event with its id."""
    return b"id: " + event_id.encode("ascii") + b"\n" + message


def state_digest(versions: Mapping[RefKey, Version]) -> str:
    """Return a text that identifies the present state of a set of tasks."""
    return _digest(f"{key}:{version}" for key, version in versions.items())


def end_id(result_ids: Iterable[str]) -> str:
    """Return the id of the last event of a stream of these tasks."""
    return f"end-{_digest(result_ids)}"


def _digest(parts: Iterable[str]) -> str:
    text = "\n".join(sorted(parts))
    return hashlib.blake2s(text.encode("utf-8", "replace"), digest_size=12).hexdigest()


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
        "data": progress.data,
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
