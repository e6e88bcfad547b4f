"""The setting TASKS_SSE -> a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from django_tasks_local.conf import option, or_none, seconds, some_seconds, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


@dataclass(frozen=True, slots=True, kw_only=True)
class SSESettings:
    """The keys of TASKS_SSE, with their defaults and checks. All times are in seconds."""

    # A link to a task is valid for this time.
    token_max_age: float = option(86_400, some_seconds)
    # Whether return values may leave the server.
    expose_results: bool = option(False, _boolean)
    # Whether the type and the text of an error may leave the server.
    expose_errors: bool = field(
        default_factory=lambda: bool(settings.DEBUG), metadata={"check": _boolean}
    )
    # A stream sends a comment after this time without an event: proxies close idle connections.
    keepalive: float = option(15, some_seconds)
    # A browser waits for this time before it connects again.
    retry: float = option(1, some_seconds)
    # After this time without an event a stream asks the backends for the states of its tasks again.
    recheck_interval: float = option(15, some_seconds)
    # Under WSGI a stream may occupy a worker for this time.
    wsgi_hold: float = option(0, seconds)
    # This process refuses further streams while this many are open. None means 80 % of the number
    # of files that the process may open.
    max_streams: int | None = option(None, or_none(whole_number(1)))
    # Whether events are also sent to django-eventstream's channels, one for each task.
    bridge: bool = option(False, _boolean)


# The options by their keys in TASKS_SSE.
FIELDS = {known.name.upper(): known for known in fields(SSESettings)}

INVALID_KEYS = "django_tasks_local_sse.E001"
INVALID_VALUE = "django_tasks_local_sse.E002"


class Mistake(NamedTuple):
    """A mistake in TASKS_SSE, with the id of the system check that reports it."""

    check_id: str
    message: str


def find_mistakes() -> Iterator[Mistake]:
    """Return all mistakes in TASKS_SSE."""
    given = getattr(settings, "TASKS_SSE", {})
    if not isinstance(given, dict):
        yield Mistake(INVALID_KEYS, f"TASKS_SSE must be a dict, not {given!r}.")
        return
    valid = f"Valid keys: {', '.join(sorted(FIELDS))}."
    for key, value in given.items():
        if key not in FIELDS:
            yield Mistake(INVALID_KEYS, f"TASKS_SSE has the unknown key {key!r}. {valid}")
        elif (wanted := FIELDS[key].metadata["check"](value)) is not None:
            yield Mistake(
                INVALID_VALUE,
                f"TASKS_SSE[{key!r}] must be {wanted}, not {value!r}.",
            )


def sse_settings() -> SSESettings:
    """
    Return the present settings.

    Raises ImproperlyConfigured for any mistake in TASKS_SSE: with a default in place of a value
    that limits access, the server might send more than the site intends.
    """
    for mistake in find_mistakes():
        raise ImproperlyConfigured(mistake.message)
    given = getattr(settings, "TASKS_SSE", {})
    return SSESettings(**{FIELDS[key].name: value for key, value in given.items()})
