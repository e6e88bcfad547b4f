"""OPTIONS of a backend as a frozen, validated dataclass. Imports nothing of this package."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Self

from django.core.exceptions import ImproperlyConfigured


def _whole_number(minimum: int) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if type(value) is int and value >= minimum:
            return None
        return f"a whole number, {minimum} or more"

    return check


MAX_SECONDS = 100_000_000  # three years; less than any system's limit for one wait


def _seconds(value: Any) -> str | None:
    if type(value) in {int, float} and 0 <= value <= MAX_SECONDS:
        return None
    return f"a number of seconds, 0 or more and at most {MAX_SECONDS:_}"


def _some_seconds(value: Any) -> str | None:
    if _seconds(value) is None and value > 0:
        return None
    return f"a number of seconds above 0 and at most {MAX_SECONDS:_}"


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if value in choices else f"one of {', '.join(map(repr, choices))}"

    return check


def _or_none(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def check_or_none(value: Any) -> str | None:
        wanted = None if value is None else check(value)
        return wanted and f"None or {wanted}"

    return check_or_none


def _option(default: Any, check: Callable[[Any], str | None]) -> Any:
    return field(default=default, metadata={"check": check})


def _default_shutdown_timeout() -> float:
    # RUN_MAIN is set under the development server's reloader, whose restart must not wait for a
    # task.
    return 0 if os.environ.get("RUN_MAIN") == "true" else 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The OPTIONS of both backends of this package. Times are in seconds."""

    max_workers: int
    # Finished results kept: above it the oldest is evicted. Unfinished ones are never evicted.
    max_results: int = _option(1000, _whole_number(1))
    # Tasks that may wait for a worker: above it enqueue() raises QueueFull.
    max_pending: int | None = _option(None, _or_none(_whole_number(0)))
    # At most one progress event per task in this time; the last one is always published.
    progress_interval: float = _option(0.05, _seconds)
    # Time for running tasks to finish when the process exits.
    shutdown_timeout: float = field(
        default_factory=_default_shutdown_timeout, metadata={"check": _seconds}
    )

    @classmethod
    def from_params(cls, alias: str, params: dict[str, Any]) -> Self:
        """
        Return the options in `params`, which is `TASKS[alias]`.

        Raises ImproperlyConfigured that names the key, the alias and the valid keys.
        """
        where = f"TASKS[{alias!r}]['OPTIONS']"
        options = params.get("OPTIONS") or {}
        if not isinstance(options, dict):
            raise ImproperlyConfigured(f"{where} must be a dict, not {options!r}.")
        known = {option.name.upper(): option for option in fields(cls)}
        values = {}
        for key, value in options.items():
            if key not in known:
                raise ImproperlyConfigured(
                    f"{where} has the unknown key {key!r}. Valid keys: {', '.join(sorted(known))}."
                )
            wanted = known[key].metadata["check"](value)
            if wanted is not None:
                raise ImproperlyConfigured(
                    f"{where}[{key!r}] must be {wanted}, not {value!r}. "
                    f"Valid keys: {', '.join(sorted(known))}."
                )
            values[known[key].name] = value
        return cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadOptions(Options):
    """OPTIONS of ThreadPoolBackend."""

    max_workers: int = _option(10, _whole_number(1))


def _default_process_count() -> int:
    if sys.version_info >= (3, 13):
        return os.process_cpu_count() or 1
    return os.cpu_count() or 1


# Without "fork": the child of a process with threads may deadlock, and servers have threads.
_START_METHODS = ("spawn",) if sys.platform == "win32" else ("forkserver", "spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions(Options):
    """OPTIONS of ProcessPoolBackend."""

    max_workers: int = field(
        default_factory=_default_process_count, metadata={"check": _whole_number(1)}
    )
    # A task that runs for longer is stopped and FAILED with TaskTimeout.
    timeout: float | None = _option(None, _or_none(_some_seconds))
    # A worker process is replaced after this many tasks.
    max_tasks_per_worker: int | None = _option(None, _or_none(_whole_number(1)))
    start_method: str = _option(_START_METHODS[0], _one_of(*_START_METHODS))
