"""
Give a worker process the Django settings of its parent: the parent sends, the worker applies them.

A worker imports the settings module as every process of the site does, because that import may have
wanted side effects. Then it replaces the imported values by those of its parent, which may differ:
a test or its runner has changed them, an app has added a database, or the module computes a value
anew at each import. A setting that was changed in place is the same object as in the parent's
settings module, so the parent cannot find differences; it sends all values.

    the parent, at enqueue()                       a worker process, at its start
    ------------------------                       ------------------------------
    SettingsWatch.has_changed()?                   runs WORKER_SETUP
    capture_settings() --> DjangoSettings -------> imports the settings module
                                                   apply_settings(), django.setup()
"""

from __future__ import annotations

import pickle
import sys
from dataclasses import dataclass
from io import BytesIO
from operator import itemgetter
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, override

from django.conf import Settings, UserSettingsHolder, global_settings, settings
from django.core.exceptions import ImproperlyConfigured
from django.core.signals import setting_changed
from django.db import connections
from django.dispatch import receiver
from django.utils.functional import LazyObject, empty

if TYPE_CHECKING:
    from collections.abc import Iterator

# Dictionaries of these settings are sent item by item, so that a single value that cannot be
# pickled, such as an SSLContext, does not prevent that the others are sent.
_BY_ITEM = {"CACHES", "DATABASES", "MAILERS", "STORAGES", "TASKS"}
# Django's own values of these types are not sent, because a worker has equal ones.
_IMMUTABLE = {str, int, float, bool, bytes, type(None)}
# SettingsWatch checks these settings. A test runner assigns the mail settings without the signal
# setting_changed. Django 6.1 replaces EMAIL_* by MAILERS.
_WATCHED = (
    "CACHES",
    "STORAGES",
    "MAILERS",
    "EMAIL_BACKEND",
    "EMAIL_HOST",
    "EMAIL_HOST_PASSWORD",
    "EMAIL_HOST_USER",
    "EMAIL_PORT",
    "EMAIL_SSL_CERTFILE",
    "EMAIL_SSL_KEYFILE",
    "EMAIL_TIMEOUT",
    "EMAIL_USE_SSL",
    "EMAIL_USE_TLS",
)
MISSING = object()  # Stands for a value that a settings module does not have.


class Value(NamedTuple):
    """Holds a setting, or an item of a dictionary, as the parent sends it."""

    # None if the value cannot be pickled: the worker then keeps the value that it has imported.
    pickled: bytes | None
    # True if the parent has imported the same object, so that the worker's import is as good.
    is_imported: bool
    # Describes the value. If the worker keeps an imported value, it must have the same description.
    # None for an object that Django has not evaluated yet: the worker keeps any value.
    description: str | None


type Node = Value | dict[Any, Node]


@dataclass(frozen=True, slots=True)
class DjangoSettings:
    """Holds the Django settings of the parent at one time."""

    module: str | None  # None if the parent has called settings.configure().
    nodes: dict[str, Node]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSettings:
    """Holds everything with which a worker sets up Django."""

    name: str
    progress_interval: float
    timeout: float | None
    setup: str | None  # the option WORKER_SETUP
    environ: dict[str, str]
    django: DjangoSettings


# The parent calls the functions below.

# A new object after each signal setting_changed. It is no number, because two threads that add 1
# concurrently may count one change only.
_version = object()


@receiver(setting_changed, dispatch_uid="django_tasks_local.settings_version")
def _on_setting_changed(**kwargs: Any) -> None:
    global _version
    _version = object()


class SettingsWatch:
    """
    Notices whether the settings have changed since its creation.

    It notices the signal setting_changed, and changes in place of DATABASES, CACHES, STORAGES,
    MAILERS and EMAIL_*, which decide where a task writes. A change in place of another setting
    sends no signal, and a comparison of all settings would take too long for every enqueue().
    """

    __slots__ = (
        "_copies",
        "_databases",
        "_get",
        "_holder",
        "_inherited",
        "_inherited_copies",
        "_proxy",
        "_size",
        "_values",
        "_version",
    )

    def __init__(self) -> None:
        self._version = _version
        # Reading `connections.settings` adds Django's defaults to DATABASES, in place.
        self._databases = _copy(connections.settings)
        # An attribute of `settings` takes 0.2 µs: LazyObject.__getattribute__() is a Python
        # function. So has_changed() reads the dictionaries behind it.
        self._proxy = settings.__dict__
        self._holder = settings_object()
        self._values = vars(self._holder)
        self._size = len(self._values)  # An assignment may add a setting.
        names = [name for name in (*_WATCHED, "default_settings") if name in self._values]
        self._get = itemgetter(*names)
        self._copies = _copy(self._get(self._values))
        # The dictionaries that override_settings() or settings.configure() has not set.
        inherited = [getattr(self._holder, n, None) for n in _WATCHED if n not in names]
        self._inherited = [value for value in inherited if type(value) is dict]
        self._inherited_copies = _copy(self._inherited)

    def has_changed(self) -> bool:
        """Return whether a setting has changed. Takes less than a microsecond."""
        try:
            return not (
                _version is self._version
                and self._proxy["_wrapped"] is self._holder
                and connections.settings == self._databases
                and len(self._values) == self._size
                and self._get(self._values) == self._copies
                and self._inherited == self._inherited_copies
            )
        except Exception:  # noqa: BLE001 - the comparison of two values may raise anything
            return True


def _copy(value: Any) -> Any:
    """Return a copy of nested dictionaries, lists and tuples, with the same items in them."""
    if type(value) is dict:
        return {key: _copy(item) for key, item in value.items()}
    if type(value) is list or type(value) is tuple:
        return type(value)(map(_copy, value))
    return value


def settings_object() -> Any:
    """Return the object behind `settings`: reading deprecated names from it issues no warning."""
    return settings._wrapped  # noqa: SLF001 - Django has no public name for it


def capture_settings() -> DjangoSettings:
    """
    Return the present settings of this process, for its workers.

    Raises ImproperlyConfigured if a value can neither be sent nor imported by a worker.
    """
    current = base = settings_object()
    while isinstance(vars(base).get("default_settings"), Settings | UserSettingsHolder):
        base = base.default_settings  # override_settings() has put `current` in front of it.
    module_name = base.SETTINGS_MODULE
    # Without a settings module, `base` has the values that settings.configure() has set.
    module = base if module_name is None else sys.modules.get(module_name, global_settings)
    nodes: dict[str, Node] = {}
    for name in dir(current):
        if not name.isupper() or name == "SETTINGS_MODULE":
            continue
        # Django reads DATABASES once, so a later assignment does not change what this process uses.
        value = connections.settings if name == "DATABASES" else getattr(current, name)
        imported = vars(module).get(name, MISSING)
        if imported is MISSING:
            imported = getattr(global_settings, name, MISSING)
            if value is imported and type(value) in _IMMUTABLE:
                continue
        nodes[name] = _node(name, value, imported, by_item=name in _BY_ITEM)
    if module_name is not None:
        for path, node in _values(nodes):
            if node.pickled is None and not node.is_imported and node.description is not None:
                raise ImproperlyConfigured(
                    f"{path} cannot be sent to a worker process, because pickle cannot serialize "
                    f"{node.description}, and a worker does not get it from the settings module "
                    f"{module_name!r}. Define it there, or run the tasks in a ThreadPoolBackend."
                )
    return DjangoSettings(module_name, nodes)


def _node(path: str, value: Any, imported: Any, *, by_item: bool) -> Node:
    if by_item and type(value) is dict:
        others = imported if type(imported) is dict else {}
        return {
            key: _node(f"{path}[{key!r}]", item, others.get(key, MISSING), by_item=True)
            for key, item in value.items()
        }
    if _is_unevaluated(value):
        return Value(None, value is imported, None)
    return Value(_pickle(value), value is imported, describe(value))


def _values(nodes: dict[Any, Node], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """Return each Value in `nodes` with its path, such as "DATABASES['default']['NAME']"."""
    for key, node in nodes.items():
        path = f"{prefix}[{key!r}]" if prefix else str(key)
        if isinstance(node, Value):
            yield path, node
        else:
            yield from _values(node, path)


class _Pickler(pickle.Pickler):
    """Refuses objects that Django has not evaluated yet: pickling them would evaluate them."""

    @override
    def reducer_override(self, obj: Any) -> Any:
        if _is_unevaluated(obj):
            raise pickle.PicklingError("a lazy object that is not evaluated")
        return NotImplemented


def _pickle(value: Any) -> bytes | None:
    file = BytesIO()
    try:
        _Pickler(file, pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception:  # noqa: BLE001 - an object's methods may raise anything
        return None
    return file.getvalue()


def _is_unevaluated(value: Any) -> bool:
    # type(), because isinstance() would evaluate a lazy object of another class.
    return issubclass(type(value), LazyObject) and value._wrapped is empty  # noqa: SLF001


def describe(value: Any) -> str:
    """
    Return the class of an object; of a function also its name and line.

    A worker compares it with that of the object that it has imported. It contains no path: the
    worker may find the file of the parent's main script under another one.
    """
    kind = type(value)
    if kind is FunctionType:
        return f"function {value.__qualname__} of line {value.__code__.co_firstlineno}"
    return f"{kind.__module__}.{kind.__qualname__}".replace("__mp_main__.", "__main__.")


def refuse_databases_in_memory() -> None:
    """Raise ImproperlyConfigured for a SQLite database in memory: no worker process can see it."""
    for connection in connections.all():
        if connection.vendor == "sqlite" and connection.is_in_memory_db():  # type: ignore[attr-defined]
            raise ImproperlyConfigured(
                f"The database {connection.alias!r} is in memory, where worker processes cannot "
                f"see it. Give it a file: for tests, set DATABASES[{connection.alias!r}]['TEST'] "
                f"= {{'NAME': BASE_DIR / 'test.sqlite3'}}; or run the tasks in a ThreadPoolBackend."
            )
