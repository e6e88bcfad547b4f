"""The setting TASKS_SSE -> a frozen dataclass."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from django.conf import settings

from django_tasks_local.conf import MAX_SECONDS


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and 0 <= value <= MAX_SECONDS


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _option(default: Any, check: Callable[[Any], bool], wanted: str) -> Any:
    return field(default=default, metadata={"check": check, "wanted": wanted})


@dataclass(frozen=True, slots=True, kw_only=True)
class SSESettings:
    """The keys of TASKS_SSE, with their defaults and checks."""

    # How long a link to a task is valid, in seconds.
    token_max_age: float = _option(86_400, _is_positive, "a number of seconds above 0")
    # Whether return values may leave the server.
    expose_results: bool = _option(False, _is_bool, "True or False")
    # Whether the type and the text of an error may leave the server; the default is DEBUG.
    expose_errors: bool = _option(False, _is_bool, "True or False")
    # Seconds without an event after which a comment is sent: proxies close idle connections.
    keepalive: float = _option(15, _is_positive, "a number of seconds above 0")
    # How long a browser waits before it connects again, in milliseconds.
    retry: int = _option(1000, lambda value: type(value) is int and value > 0, "an integer above 0")
    # How long a stream may occupy a worker under WSGI, in seconds.
    wsgi_hold: float = _option(0, _is_number, "a number of seconds, 0 or more")
    # Whether events are also sent to django-eventstream's channels, one for each task.
    bridge: bool = _option(False, _is_bool, "True or False")


# The options by their keys in TASKS_SSE.
FIELDS = {option.name.upper(): option for option in fields(SSESettings)}


def sse_settings() -> SSESettings:
    """Return the present settings; a key with an invalid value has its default."""
    given = getattr(settings, "TASKS_SSE", None)
    values: dict[str, Any] = {"expose_errors": bool(settings.DEBUG)}
    if isinstance(given, dict):
        for key, value in given.items():
            option = FIELDS.get(key)
            if option is not None and option.metadata["check"](value):
                values[option.name] = value
    return SSESettings(**values)
