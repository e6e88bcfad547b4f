"""
Give a worker process the Django settings of its parent: the parent sends, the worker applies them.

A worker imports the settings module as every process of the site does. The parent sends the values
that this import does not contain: those of settings.configure(), those that a test or its runner
has replaced, and the names of test databases.
"""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import django
from django.conf import UserSettingsHolder, global_settings, settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

if TYPE_CHECKING:
    from types import ModuleType


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Holds the settings, environment and database names with which a worker sets up Django."""

    name: str
    progress_interval: float
    environ: dict[str, str]
    settings_module: str | None
    # The pickled values of all settings that differ from the settings module.
    overrides: dict[str, bytes] = field(default_factory=dict)
    # The names of settings that differ from the settings module, and that cannot be pickled.
    unpickleable: list[str] = field(default_factory=list)
    # The NAME of each database, because a test runner changes the names inside of DATABASES.
    databases: dict[str, Any] = field(default_factory=dict)


# The parent calls the functions below.


def worker_settings(name: str, progress_interval: float) -> WorkerSettings:
    """Return the current settings of this process, for a worker that it starts now."""
    holder = _settings_object()
    while isinstance(holder, UserSettingsHolder):
        holder = holder.default_settings
    module_name = getattr(holder, "SETTINGS_MODULE", None)
    overrides, unpickleable = _overrides(sys.modules.get(module_name or "", global_settings))
    return WorkerSettings(
        name=name,
        progress_interval=progress_interval,
        environ=dict(os.environ),
        settings_module=module_name,
        overrides=overrides,
        unpickleable=unpickleable,
        databases=database_names(),
    )


def _settings_object() -> Any:
    """Return the object behind `settings`: reading deprecated names from it issues no warning."""
    return settings._wrapped  # noqa: SLF001 - Django has no public name for it


def _overrides(module: ModuleType) -> tuple[dict[str, bytes], list[str]]:
    """
    Return the pickled settings that differ from `module`, and the names of unpickleable ones.

    settings.configure() has set them, or a test has replaced them. For example, a worker without
    the EMAIL_BACKEND of the test runner would send real mail.
    """
    overrides = {}
    unpickleable = []
    current = _settings_object()
    for name in dir(current):
        if not name.isupper() or name == "SETTINGS_MODULE":
            continue
        value = getattr(current, name)
        if value is getattr(module, name, getattr(global_settings, name, None)):
            continue
        try:
            overrides[name] = pickle.dumps(value)
        except Exception:  # noqa: BLE001 - an object's methods may raise anything
            unpickleable.append(name)
    return overrides, unpickleable


def database_names() -> dict[str, Any]:
    """Return the NAME of each database alias at present; a test runner changes it."""
    databases = settings.DATABASES.items()
    return {alias: database["NAME"] for alias, database in databases if database.get("NAME")}


def refuse_databases_in_memory() -> None:
    """Raise ImproperlyConfigured for a SQLite database in memory: no worker process can see it."""
    for connection in connections.all():
        if connection.vendor == "sqlite" and connection.is_in_memory_db():  # type: ignore[attr-defined]
            raise ImproperlyConfigured(
                f"The database {connection.alias!r} is in memory, where worker processes cannot "
                f"see it. Give it a file: for tests, set DATABASES[{connection.alias!r}]['TEST'] "
                f"= {{'NAME': BASE_DIR / 'test.sqlite3'}}; or run the tasks in a ThreadPoolBackend."
            )


# A worker process calls the functions below.


def set_up_django(parent: WorkerSettings) -> None:
    """Set up Django with the parent's environment, settings and databases."""
    os.environ.clear()
    os.environ.update(parent.environ)
    if parent.settings_module is not None:
        os.environ["DJANGO_SETTINGS_MODULE"] = parent.settings_module
    elif not settings.configured:
        # The parent called settings.configure() under `if __name__ == "__main__"`. That line does
        # not run when a worker imports the parent's script.
        if parent.unpickleable:
            raise ImproperlyConfigured(
                f"These settings cannot be sent to a worker process: "
                f"{', '.join(parent.unpickleable)}. Call settings.configure() where it also "
                f'happens when the script is imported, outside of `if __name__ == "__main__"`.'
            )
        settings.configure()
    with warnings.catch_warnings(action="ignore"):  # The parent has issued the same warnings.
        for name, value in parent.overrides.items():
            setattr(settings, name, pickle.loads(value))  # noqa: S301 - the parent sent it
    for alias, database in parent.databases.items():
        settings.DATABASES[alias]["NAME"] = database
    django.setup()
