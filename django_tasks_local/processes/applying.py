"""
Set up Django in a worker process with the settings of its parent.

The module `settings` collects them in the parent, and describes the steps of both sides.
"""

from __future__ import annotations

import os
import pickle
import time
import warnings
from typing import TYPE_CHECKING, Any

import django
from django.conf import global_settings, settings
from django.core.cache import caches
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils.module_loading import import_string

from .settings import MISSING, Value, describe, settings_object

if TYPE_CHECKING:
    from .settings import DjangoSettings, Node, WorkerSettings


def set_up_django(parent: WorkerSettings) -> None:
    """Set up Django with the parent's environment, WORKER_SETUP and settings."""
    os.environ.clear()
    os.environ.update(parent.environ)
    if parent.django.module is not None:
        os.environ["DJANGO_SETTINGS_MODULE"] = parent.django.module
    if parent.setup is not None:
        import_string(parent.setup)()
    if parent.django.module is None and not settings.configured:
        # The parent called settings.configure() under `if __name__ == "__main__"`. That line does
        # not run when a worker imports the parent's script.
        settings.configure()
    with warnings.catch_warnings(action="ignore"):  # The parent has issued the same warnings.
        _apply(parent.django)
    django.setup()


def _apply(parent: DjangoSettings) -> None:
    """Give all settings of this process, which has imported its own, the values of the parent."""
    bool(settings.DEBUG)  # Reading any setting imports the settings module.
    holder = settings_object()
    for name in dir(holder):
        if name.isupper() and name not in parent.nodes and name != "SETTINGS_MODULE":
            if hasattr(global_settings, name):
                setattr(holder, name, getattr(global_settings, name))
            else:
                delattr(holder, name)  # The parent does not have this setting.
    for name, node in parent.nodes.items():
        value = _load(name, node, getattr(holder, name, MISSING), parent)
        if value is not MISSING:
            setattr(holder, name, value)
    if hasattr(time, "tzset") and settings.TIME_ZONE:
        os.environ["TZ"] = settings.TIME_ZONE
        time.tzset()
    settings._wrapped = holder  # noqa: SLF001 - the assignment clears the cache of `settings`
    _forget_connections()


def _forget_connections() -> None:
    """Let Django read DATABASES and CACHES again; importing the parent's script may use them."""
    if "settings" in vars(connections):
        for connection in connections.all(initialized_only=True):
            connection.close()
            del connections[connection.alias]
    for handler in (connections, caches):
        vars(handler).pop("settings", None)


def _load(path: str, node: Node, imported: Any, parent: DjangoSettings) -> Any:
    """Return the value of the parent, or `imported` for one that could not be sent."""
    if not isinstance(node, Value):
        others = imported if isinstance(imported, dict) else {}
        items = {
            key: _load(f"{path}[{key!r}]", child, others.get(key, MISSING), parent)
            for key, child in node.items()
        }
        return {key: item for key, item in items.items() if item is not MISSING}
    error = None
    if node.pickled is not None:
        try:
            return pickle.loads(node.pickled)  # noqa: S301 - the parent has pickled it
        except Exception as exception:  # noqa: BLE001 - loading may raise anything
            error = exception
    if node.description is None:
        return imported
    if node.is_imported and imported is not MISSING and describe(imported) == node.description:
        return imported
    hint = "Define it in the settings module"
    if parent.module is None:
        hint = (
            "Call settings.configure() where it also happens when the script is imported, outside "
            'of `if __name__ == "__main__"`'
        )
    raise ImproperlyConfigured(
        f"{path} cannot be sent to a worker process, because pickle cannot transfer "
        f"{node.description}, and the worker has not imported it. {hint}, or run the tasks in a "
        f"ThreadPoolBackend."
    ) from error
