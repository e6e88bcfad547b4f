"""Carry values from enqueue() into the task: OPTIONS["CONTEXT"], and the databases of a test."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from contextvars import ContextVar
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol, cast

from django.core.exceptions import ImproperlyConfigured
from django.utils import translation
from django.utils.json import normalize_json
from django.utils.module_loading import import_string

from .databases import TaskDatabases, databases_of_test

if TYPE_CHECKING:
    from collections.abc import Callable

    from .databases import Places

    # The form in which a worker process receives a Carried.
    type PlainCarried = tuple[Places | None, dict[str, Any]]


class Carrier(Protocol):
    """Declares the methods of a class that OPTIONS["CONTEXT"] names."""

    def capture(self) -> Any:
        """Return a JSON value. Called from: enqueue(), which raises what this raises."""

    def restore(self, value: Any) -> AbstractContextManager[object]:
        """Return a context manager in which the task runs. The task fails if this raises."""


class Language:
    """Carries the active language, so that a task translates as the view that has enqueued it."""

    def capture(self) -> str | None:
        """Return the active language; None if translations are deactivated."""
        return translation.get_language()

    def restore(self, value: str | None) -> AbstractContextManager[object]:
        """Return a context manager that activates the language."""
        return translation.override(value)


class Carried:
    """Holds what a task takes along from its enqueue(). Most tasks have none."""

    __slots__ = ("databases", "values")

    def __init__(self, databases: TaskDatabases | None, values: dict[str, Any]) -> None:
        self.databases = databases
        self.values = values  # by the dotted path of the variable or class

    def plain(self) -> PlainCarried:
        """Return plain values, of which from_plain() makes an equal object in a worker process."""
        return None if self.databases is None else self.databases.places, self.values

    @classmethod
    def from_plain(cls, plain: PlainCarried | None) -> Carried | None:
        """Return the object of which plain() has returned these values; None for None."""
        if plain is None:
            return None
        places, values = plain
        return cls(None if places is None else TaskDatabases(places), values)

    def difference(self) -> str | None:
        """Return a sentence if the databases differ from those at enqueue(), else None."""
        return None if self.databases is None else self.databases.difference()

    def call(self, function: Callable[[], Any]) -> Any:
        """Call the task with the values. Called from: the Context that was made for the task."""
        if self.databases is None:
            return self._call_with_values(function)
        return self.databases.enforce(lambda: self._call_with_values(function))

    def _call_with_values(self, function: Callable[[], Any]) -> Any:
        if not self.values:
            return function()
        with ExitStack() as stack:
            for path, value in self.values.items():
                target = _target(path)
                if isinstance(target, ContextVar):
                    target.set(value)
                else:
                    stack.enter_context(target.restore(value))
            return function()


def carry(paths: tuple[str, ...]) -> Carried | None:
    """
    Return what a task takes along that is enqueued now; None if that is nothing.

    Raises ImproperlyConfigured for a wrong path in OPTIONS["CONTEXT"], and ValueError for a value
    that is not JSON.
    """
    databases = databases_of_test()
    values = {}
    for path in paths:
        target = _target(path)
        if isinstance(target, ContextVar):
            try:
                value = target.get()
            except LookupError:
                continue  # The variable has no value here, and will have none in the task.
        else:
            value = target.capture()
        try:
            values[path] = normalize_json(value)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"The value of {path} in OPTIONS['CONTEXT'] must be JSON, and a value of type "
                f"{type(value).__qualname__} is not: {error}"
            ) from error
    return Carried(databases, values) if databases is not None or values else None


@lru_cache
def _target(path: str) -> ContextVar[Any] | Carrier:
    """Return the ContextVar, or an instance of the class, at a path in OPTIONS["CONTEXT"]."""
    try:
        target = import_string(path)
    except ImportError as error:
        raise ImproperlyConfigured(f"OPTIONS['CONTEXT'] names {path!r}: {error}") from error
    if isinstance(target, ContextVar):
        return target
    if not (isinstance(target, type) and hasattr(target, "capture") and hasattr(target, "restore")):
        raise ImproperlyConfigured(
            f"OPTIONS['CONTEXT'] names {path!r}, which is neither a ContextVar nor a class with "
            f"the methods capture() and restore()."
        )
    return cast("Carrier", target())
