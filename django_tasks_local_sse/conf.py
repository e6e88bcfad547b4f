"""The setting TASKS_SSE -> a frozen dataclass."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured

from django_tasks_local.conf import MAX_SECONDS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _seconds(value: Any) -> str | None:
    if type(value) in {int, float} and 0 <= value <= MAX_SECONDS:
        return None
    return f"a number of seconds, 0 or more and at most {MAX_SECONDS:_}"


def _some_seconds(value: Any) -> str | None:
    if _seconds(value) is None and value > 0:
        return None
    return f"a number of seconds above 0 and at most {MAX_SECONDS:_}"


def _count_or_none(value: Any) -> str | None:
    if value is None or (type(value) is int and value > 0):
        return None
    return "None or a whole number, 1 or more"


def _option(default: Any, check: Callable[[Any], str | None]) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, slots=True, kw_only=True)
class SSESettings:
    """The keys of TASKS_SSE, with their defaults and checks. All times are in seconds."""

    # A link to a task is valid for this time.
    token_max_age: float = _option(86_400, _some_seconds)
    # Whether return values may leave the server.
    expose_results: bool = _option(False, _boolean)
    # Whether the type and the text of an error may leave the server.
    expose_errors: bool = field(
        default_factory=lambda: bool(settings.DEBUG), metadata={"check": _boolean}
    )
    # A stream sends a comment after this time without an event: proxies close idle connections.
    keepalive: float = _option(15, _some_seconds)
    # A browser waits for this time before it connects again.
    retry: float = _option(1, _some_seconds)
    # After this time without an event a stream asks the backends for the states of its tasks again.
    recheck_interval: float = _option(15, _some_seconds)
    # Under WSGI a stream may occupy a worker for this time.
    wsgi_hold: float = _option(0, _seconds)
    # This process refuses further streams while this many are open. None means 80 % of the number
    # of files that the process may open.
    max_streams: int | None = _option(None, _count_or_none)
    # Whether events are also sent to django-eventstream's channels, one for each task.
    bridge: bool = _option(False, _boolean)


# The options by their keys in TASKS_SSE.
FIELDS = {option.name.upper(): option for option in fields(SSESettings)}

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
                "django_tasks_local_sse.E002",
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
