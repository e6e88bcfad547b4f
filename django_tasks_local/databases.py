"""
Keep a task of a test run away from other databases than those that it was enqueued for.

A test runner changes the names in DATABASES, and changes them back after the run. The process then
waits for running tasks. A task that opens a connection at this time, or a receiver of its signals,
would write into the configured database. So a task that is enqueued in a test environment keeps the
places of all databases, and fails if one of them differs at its start or at a new connection.
"""

from __future__ import annotations

import sys
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.db.backends.signals import connection_created
from django.dispatch import receiver

from .exceptions import DatabaseChanged

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.db.backends.base.base import BaseDatabaseWrapper

    # The settings in _PLACE of each alias, as text. A worker process compares those of its parent
    # with its own.
    type Places = dict[str, tuple[str, ...]]

TEST_UTILS = "django.test.utils"  # Only a process that has imported this module runs tests.
_PLACE = ("ENGINE", "NAME", "USER", "HOST", "PORT")

# The databases of the task that runs in this context, or whose receivers run in it.
_current: ContextVar[TaskDatabases] = ContextVar("django_tasks_local.databases")


def databases_of_test() -> TaskDatabases | None:
    """Return the databases for a task that is enqueued now; None outside of a test run."""
    enqueuing = _current.get(None)
    if enqueuing is not None:  # The test run may have ended, and the task that enqueues goes on.
        return TaskDatabases(enqueuing.places)
    if not has_test_environment():
        return None
    return TaskDatabases({a: _place(settings) for a, settings in connections.settings.items()})


def is_test_run() -> bool:
    """Return whether this process runs tests, or the calling task was enqueued in a test run."""
    return _current.get(None) is not None or has_test_environment()


def has_test_environment() -> bool:
    """Return whether setup_test_environment() is in effect. enqueue() calls this each time."""
    utils: Any = sys.modules.get(TEST_UTILS)
    # setup_test_environment() sets this attribute, and teardown_test_environment() deletes it.
    return utils is not None and hasattr(utils._TestState, "saved_data")  # noqa: SLF001


def _place(settings: dict[str, Any]) -> tuple[str, ...]:
    return tuple([str(settings.get(key) or "") for key in _PLACE])


class TaskDatabases:
    """Holds the places of the databases for which a task of a test run was enqueued."""

    __slots__ = ("error", "places")

    def __init__(self, places: Places) -> None:
        self.places = places
        # The reason if the task has tried to open a connection to another database.
        self.error: str | None = None

    def difference(self) -> str | None:
        """Return a sentence that names a database that is at another place now; None if none is."""
        present = connections.settings
        for alias, place in self.places.items():
            now = _place(present.get(alias, {}))
            if now != place:
                return _describe(alias, place, now)
        return None

    def enforce(self, function: Callable[[], Any]) -> Any:
        """
        Call a function; raise DatabaseChanged before it, at a new connection, and then after it.

        This is no context manager, because contextlib reads attributes of the task's exception, and
        those of a user's class may raise anything.
        """
        _current.set(self)
        if difference := self.difference():
            raise DatabaseChanged(difference)
        try:
            return function()
        finally:
            if self.error is not None:  # The task may have caught the exception.
                raise DatabaseChanged(self.error)

    def guard(self, function: Callable[..., object]) -> Callable[..., None]:
        """Return a function that calls `function`, and in which no other database is connected."""

        def call(*args: object) -> None:
            token = _current.set(self)
            try:
                function(*args)
            finally:
                _current.reset(token)

        return call

    def check(self, connection: BaseDatabaseWrapper) -> None:
        """Close a connection to another database, and raise DatabaseChanged."""
        place = self.places.get(connection.alias)
        now = _place(connection.settings_dict)
        if place is not None and now != place:
            # Django keeps a connection after an exception in a receiver of connection_created, and
            # the next query would use it.
            connection.close()
            self.error = _describe(connection.alias, place, now)
            raise DatabaseChanged(self.error)


def _describe(alias: str, place: tuple[str, ...], now: tuple[str, ...]) -> str:
    return (
        f"The task was enqueued in a test run for the database {alias!r} at {_name(place)}, "
        f"which is at {_name(now)} now. The task has probably outlived its test: wait for tasks "
        f"with django_tasks_local.testing.wait_until_idle()."
    )


def _name(place: tuple[str, ...]) -> str:
    return ", ".join(f"{key}={text!r}" for key, text in zip(_PLACE, place, strict=True) if text)


@receiver(connection_created, dispatch_uid="django_tasks_local.databases")
def _on_connection_created(*, connection: BaseDatabaseWrapper, **kwargs: Any) -> None:
    databases = _current.get(None)
    if databases is not None:
        databases.check(connection)
