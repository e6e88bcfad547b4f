"""
The functions of this module report configurations and calls that work, but hardly as intended.

A backend's `check()` returns the messages about its settings to `manage.py check` and `runserver`.
Source: Django's topic guide "System check framework".
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import django.tasks
from django.conf import settings
from django.core.cache import caches
from django.core.cache.backends.locmem import LocMemCache
from django.core.checks import CheckMessage
from django.core.checks import Warning as CheckWarning
from django.db import connections

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .conf import Options

# A warning names the line of the application that called a function in one of these folders.
CALLED_BY_USERS = (str(Path(__file__).parent), str(Path(django.tasks.__file__).parent))


def check_web_workers(alias: str) -> Iterator[CheckMessage]:
    """Report several web workers, because each has tasks and results of its own."""
    workers = os.environ.get("WEB_CONCURRENCY", "")
    if workers.isdecimal() and int(workers) > 1:
        yield CheckWarning(
            f"WEB_CONCURRENCY announces {workers} web workers, and each knows only its own tasks "
            f"of the task backend {alias!r}: another worker has no result and no progress of them.",
            hint="Run one web worker, with threads or async views; or let the load balancer send "
            "each visitor to the same worker every time, and silence this check.",
            id="django_tasks_local.W001",
        )


def check_misplaced_options(
    alias: str, params: Mapping[str, Any], names: frozenset[str]
) -> Iterator[CheckMessage]:
    """Report keys of TASKS[alias] that are names of options, because they have no effect there."""
    misplaced = [key for key in params if str(key).upper() in names]
    if misplaced:
        yield CheckWarning(
            f"TASKS[{alias!r}] has {', '.join(map(repr, misplaced))} beside OPTIONS, where it has "
            f"no effect.",
            hint=f"Move it into TASKS[{alias!r}]['OPTIONS'].",
            id="django_tasks_local.W002",
        )


def check_sqlite(alias: str, options: Options) -> Iterator[CheckMessage]:
    """Report SQLite databases in which concurrent tasks fail with "database is locked"."""
    if options.max_workers < 2:
        return
    connection: Any
    for connection in connections.all():
        mode = connection.settings_dict["OPTIONS"].get("transaction_mode") or "DEFERRED"
        if (
            connection.vendor == "sqlite"
            and not connection.is_in_memory_db()
            and str(mode).upper() == "DEFERRED"
        ):
            yield CheckWarning(
                f"The database {connection.alias!r} is SQLite with deferred transactions, and the "
                f"task backend {alias!r} has {options.max_workers} workers: if two tasks read and "
                f"then write in a transaction, one fails at once with 'database is locked'.",
                hint=f"Set DATABASES[{connection.alias!r}]['OPTIONS']['transaction_mode'] to "
                f"'IMMEDIATE', or MAX_WORKERS to 1.",
                id="django_tasks_local.W003",
            )


def check_local_memory_cache(alias: str) -> Iterator[CheckMessage]:
    """
    Report caches in local memory, of which each worker process has its own.

    Reports nothing without the setting CACHES, whose default is such a cache: most projects without
    this setting use no cache.
    """
    if not settings.is_overridden("CACHES"):
        return
    local = [repr(name) for name in settings.CACHES if isinstance(caches[name], LocMemCache)]
    if local:
        yield CheckWarning(
            f"Each worker process of the task backend {alias!r} has its own copy of the cache "
            f"{', '.join(local)}, because LocMemCache keeps values in the memory of one process: "
            f"the web process does not see what a task stores.",
            hint="Use a cache that processes share, such as the database cache or Redis.",
            id="django_tasks_local.W004",
        )


def warn_in_atomic_block(path: str, warned_paths: set[str]) -> None:
    """
    Warn that the task with this path may start before the data that it needs is committed.

    Does nothing if this thread is in no atomic block, or only in those in which a TestCase runs its
    tests, and for paths that are in `warned_paths` already.
    """
    if path in warned_paths:
        return
    connection: Any
    for connection in connections.all(initialized_only=True):
        if any(not block._from_testcase for block in connection.atomic_blocks):  # noqa: SLF001
            warned_paths.add(path)
            warnings.warn(
                f"Task {path} was enqueued in an atomic block of the database "
                f"{connection.alias!r}: it may start before the commit, and not find the rows that "
                f"the block has written. Enqueue it with transaction.on_commit(). This warning "
                f"appears once for a task, and only with DEBUG.",
                RuntimeWarning,
                skip_file_prefixes=CALLED_BY_USERS,
            )
            return
