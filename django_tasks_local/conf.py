"""This module validates a backend's OPTIONS in dataclasses. It imports only `cpus`."""

import os
import sys
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

from django.core.exceptions import ImproperlyConfigured

from .cpus import count_cpus

# Checks of values: each returns None for a valid value, else a text that says what is wanted.


def whole_number(minimum: int) -> Callable[[Any], str | None]:
    """Return a check for an int that is not below `minimum`."""

    def check(value: Any) -> str | None:
        if type(value) is int and value >= minimum:
            return None
        return f"a whole number, {minimum} or more"

    return check


# The largest value of an option in seconds, about three years. Waits use limit_wait(), because
# Windows limits one wait to 49 days.
MAX_SECONDS = 100_000_000


def seconds(value: Any) -> str | None:
    """Check a number of seconds from 0 to MAX_SECONDS."""
    if type(value) in {int, float} and 0 <= value <= MAX_SECONDS:
        return None
    return f"a number of seconds, 0 or more and at most {MAX_SECONDS:_}"


def some_seconds(value: Any) -> str | None:
    """Check a number of seconds above 0."""
    if seconds(value) is None and value > 0:
        return None
    return f"a number of seconds above 0 and at most {MAX_SECONDS:_}"


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        return None if value in choices else f"one of {', '.join(map(repr, choices))}"

    return check


def _dotted_path(value: Any) -> str | None:
    if (
        type(value) is str
        and all(part.isidentifier() for part in value.split("."))
        and "." in value
    ):
        return None
    return "the dotted path of a function"


def _dotted_paths(value: Any) -> str | None:
    if type(value) is tuple and not any(map(_dotted_path, value)):
        return None
    return "a list of dotted paths, each of a ContextVar or a class"


def or_none(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    """Return a check that also accepts None."""

    def check_or_none(value: Any) -> str | None:
        wanted = None if value is None else check(value)
        return wanted and f"None or {wanted}"

    return check_or_none


def option(default: Any, check: Callable[[Any], str | None]) -> Any:
    """Return a dataclass field with this default, whose value must pass the check."""
    return field(default=default, metadata={"check": check})


_RELOADING_SERVERS = {"uvicorn", "gunicorn", "granian", "hypercorn"}


def _default_shutdown_timeout() -> float:
    return 0 if _has_reloader() else 5


def _has_reloader() -> bool:
    """
    Return whether a development server restarts this process after each change of the code.

    Such a restart must not wait for a task. The reloader of Django's development server sets
    RUN_MAIN; the other servers have an option, which multiprocessing copies to their workers.
    """
    if os.environ.get("RUN_MAIN") == "true":
        return True
    program = Path(sys.argv[0] if sys.argv else "")
    name = program.parent.name if program.stem == "__main__" else program.stem
    return name in _RELOADING_SERVERS and "--reload" in sys.argv


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The OPTIONS that both backends of this package accept. All times are in seconds."""

    max_workers: int
    # The store keeps this many finished results and evicts the oldest finished result beyond it. It
    # never evicts an unfinished one.
    max_results: int = option(1000, whole_number(1))
    # enqueue() raises QueueFull if max_pending + max_workers tasks are unfinished: while all
    # workers are busy, this many tasks may wait. None means that there is no limit.
    max_pending: int | None = option(None, or_none(whole_number(0)))
    # A task publishes at most one progress event in this time. Its last progress is always
    # published, at the latest in its `finished` event.
    progress_interval: float = option(0.05, seconds)
    # A task sees these variables as they are when it is enqueued.
    context: tuple[str, ...] = option((), _dotted_paths)
    # The pool cancels a task that runs for longer than this and fails it with TaskTimeout.
    timeout: float | None = option(None, or_none(some_seconds))
    # When the process exits, it gives running tasks this time to finish, and then fails them.
    shutdown_timeout: float = field(
        default_factory=_default_shutdown_timeout, metadata={"check": seconds}
    )

    @property
    def max_unfinished(self) -> int | None:
        """Return the number of unfinished tasks above which enqueue() raises QueueFull."""
        return None if self.max_pending is None else self.max_pending + self.max_workers

    @classmethod
    def known(cls) -> dict[str, Field[Any]]:
        """Return the fields of this class by the keys that they have in the setting."""
        return {known.name.upper(): known for known in fields(cls)}

    @classmethod
    def from_params(cls, alias: str, params: dict[str, Any]) -> Self:
        """
        Return the validated options in `params`, which is the setting `TASKS[alias]`.

        Raises ImproperlyConfigured, with the key, the alias and the valid keys in its message.
        """
        where = f"TASKS[{alias!r}]['OPTIONS']"
        options = params.get("OPTIONS") or {}
        if not isinstance(options, dict):
            raise ImproperlyConfigured(f"{where} must be a dict, not {options!r}.")
        known = cls.known()
        values = {}
        for key, value in options.items():
            if key not in known:
                similar = get_close_matches(str(key).upper(), known, n=1)
                question = f" Did you mean {similar[0]!r}?" if similar else ""
                raise ImproperlyConfigured(
                    f"{where} has the unknown key {key!r}.{question} "
                    f"Valid keys: {', '.join(sorted(known))}."
                )
            if type(value) is list:  # Options must be hashable.
                value = tuple(value)
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
    """The OPTIONS that ThreadPoolBackend accepts."""

    max_workers: int = option(10, whole_number(1))


# "fork" is not offered, because a child that a process with threads forks may deadlock, and servers
# have threads.
_START_METHODS = ("spawn",) if sys.platform == "win32" else ("forkserver", "spawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessOptions(Options):
    """The OPTIONS that ProcessPoolBackend accepts."""

    max_workers: int = field(default_factory=count_cpus, metadata={"check": whole_number(1)})
    # The pool replaces a worker process that has run this many tasks. None means never.
    max_tasks_per_worker: int | None = option(None, or_none(whole_number(1)))
    # The pool ends a worker process that has waited for a task for this long. None means never.
    idle_timeout: float | None = option(None, or_none(some_seconds))
    start_method: str = option(_START_METHODS[0], _one_of(*_START_METHODS))
    # Each worker process calls the function at this dotted path before it imports the settings.
    worker_setup: str | None = option(None, or_none(_dotted_path))
