"""
The settings of Django in a worker process: sent by the parent, applied by the worker.

A worker imports the settings module as every process of the site does. What that import does not
give it is sent: settings.configure(), settings that a test or its runner has replaced, the names of
test databases.
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
    """The settings, environment and database names with which a worker sets up Django."""

    name: str
    progress_interval: float
    environ: dict[str, str]
    settings_module: str | None
    # Settings whose value is not that of the settings module, each pickled separately.
    overrides: dict[str, bytes] = field(default_factory=dict)
    unpickleable: list[str] = field(default_factory=list)
    # The NAME of each database: a test runner changes it inside of DATABASES.
    databases: dict[str, Any] = field(default_factory=dict)


# In the parent


def worker_settings(name: str, progress_interval: float) -> WorkerSettings:
    """Return the settings that a worker which starts now must have."""
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
    """Return the object behind LazySettings, which warns if deprecated names are read from it."""
    return settings._wrapped  # noqa: SLF001 - there is no public name for it


def _overrides(module: ModuleType) -> tuple[dict[str, bytes], list[str]]:
    """
    Return the settings whose value is not that of the settings module.

    They come from settings.configure(), or a test has replaced them: a worker without a replaced
    EMAIL_BACKEND would send real mail.
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
        except Exception:  # noqa: BLE001 - pickle raises whatever an object's methods raise
            unpickleable.append(name)
    return overrides, unpickleable


def database_names() -> dict[str, Any]:
    """Return the name of each database, which a test runner changes."""
    databases = settings.DATABASES.items()
    return {alias: database["NAME"] for alias, database in databases if database.get("NAME")}


def refuse_databases_in_memory() -> None:
    """Raise ImproperlyConfigured if a worker process could not see one of the databases."""
    for connection in connections.all():
        if connection.vendor == "sqlite" and connection.is_in_memory_db():  # type: ignore[attr-defined]
            raise ImproperlyConfigured(
                f"The database {connection.alias!r} is in memory, where worker processes cannot "
                f"see it. Give it a file: for tests, set DATABASES[{connection.alias!r}]['TEST'] "
                f"= {{'NAME': BASE_DIR / 'test.sqlite3'}}; or run the tasks in a ThreadPoolBackend."
            )


# In the worker


def set_up_django(parent: WorkerSettings) -> None:
    """Set up Django with the parent's environment, settings and databases."""
    os.environ.clear()
    os.environ.update(parent.environ)
    if parent.settings_module is not None:
        os.environ["DJANGO_SETTINGS_MODULE"] = parent.settings_module
    elif not settings.configured:
        # The parent called settings.configure() inside of `if __name__ == "__main__"`, which does
        # not run when a worker imports its script.
        if parent.unpickleable:
            raise ImproperlyConfigured(
                f"These settings cannot be sent to a worker process: "
                f"{', '.join(parent.unpickleable)}. Call settings.configure() where it also "
                f'happens when the script is imported, outside of `if __name__ == "__main__"`.'
            )
        settings.configure()
    with warnings.catch_warnings(action="ignore"):  # The parent has issued them already.
        for name, value in parent.overrides.items():
            setattr(settings, name, pickle.loads(value))  # noqa: S301 - from our own parent
    for alias, database in parent.databases.items():
        settings.DATABASES[alias]["NAME"] = database
    django.setup()
