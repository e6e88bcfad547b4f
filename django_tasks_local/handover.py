"""What a worker process is given of its parent's Django: settings, and names of databases."""

from __future__ import annotations

import os
import pickle
import sys
from typing import TYPE_CHECKING, Any

from django.conf import UserSettingsHolder, global_settings, settings
from django.core.exceptions import ImproperlyConfigured
from django.db import connections

from . import worker

if TYPE_CHECKING:
    from types import ModuleType


def worker_setup(name: str, progress_interval: float) -> worker.Setup:
    """Return what a new worker must know, as it is now."""
    holder = settings._wrapped
    while isinstance(holder, UserSettingsHolder):
        holder = holder.default_settings
    module_name = getattr(holder, "SETTINGS_MODULE", None)
    overrides, unpickleable = _overrides(sys.modules.get(module_name or "", global_settings))
    return worker.Setup(
        name=name,
        progress_interval=progress_interval,
        environ=dict(os.environ),
        settings_module=module_name,
        overrides=overrides,
        unpickleable=unpickleable,
        databases=database_names(),
    )


def _overrides(module: ModuleType) -> tuple[dict[str, bytes], list[str]]:
    """
    Return the settings that are not what the settings module says.

    These are those of settings.configure(), and what a test or its runner has replaced, such as
    EMAIL_BACKEND: a worker that did not know of it would send real mail.
    """
    overrides = {}
    unpickleable = []
    for name in dir(settings._wrapped):
        if not name.isupper() or name == "SETTINGS_MODULE":
            continue
        value = getattr(settings._wrapped, name)
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
    """Raise ImproperlyConfigured when a worker process could not see one of the databases."""
    for connection in connections.all():
        if connection.vendor == "sqlite" and connection.is_in_memory_db():  # type: ignore[attr-defined]
            raise ImproperlyConfigured(
                f"The database {connection.alias!r} is in memory, where worker processes cannot "
                f"see it. Give it a file: for tests, set DATABASES[{connection.alias!r}]['TEST'] "
                f"= {{'NAME': BASE_DIR / 'test.sqlite3'}}; or run the tasks in a ThreadPoolBackend."
            )
