"""This package keeps one pool per backend alias and process; a pool queues and runs the tasks."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from django.core.signals import setting_changed
from django.dispatch import receiver

from .. import shutdown
from ..forking import reset_in_child
from .base import Pool
from .statistics import PoolStatistics

if TYPE_CHECKING:
    from ..conf import Options

__all__ = ["Pool", "PoolStatistics", "all_pools", "discard_all", "pool_for"]

_pools: dict[tuple[type, str, Options], Pool[Any, Any]] = {}
# Guards changes of `_pools`, so that threads that enqueue their first tasks concurrently create
# only one pool.
_pools_lock = threading.RLock()


def pool_for(
    pool_class: type[Pool[Any, Any]], sender: type, alias: str, options: Options
) -> Pool[Any, Any]:
    """Return this process's pool for a backend alias; create it at first and after its close()."""
    key = (sender, alias, options)
    pool = _pools.get(key)
    if pool is None or pool.is_replaced:
        with _pools_lock:
            closed = pool = _pools.get(key)
            if pool is None or pool.is_replaced:
                pool = pool_class(sender, alias, options)
                if closed is not None:
                    pool.take_results_of(closed)
                    shutdown.unregister(closed)
                _pools[key] = pool
    return pool


def all_pools() -> list[Pool[Any, Any]]:
    """Return the pools of this process that have not been discarded."""
    return list(_pools.values())


def discard_all() -> None:
    """
    Close and remove all pools; the next task of an alias starts a new pool.

    May be called from any thread.
    """
    with _pools_lock:
        pools = all_pools()
        for pool in pools:
            # Set before `_pools.clear()`: a child that another thread forks between the two would
            # no longer find the pool in `_pools`, so _forget_pools() could not set the flag.
            pool.is_replaced = True
        _pools.clear()
    for pool in pools:
        pool.discard()
        shutdown.unregister(pool)


@receiver(setting_changed, dispatch_uid="django_tasks_local.setting_changed")
def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    """Discard all pools when a test overrides TASKS, because Django discards their backends."""
    if setting == "TASKS":
        discard_all()


@reset_in_child
def _forget_pools() -> None:
    """Drop the pools in a child of fork(): their threads, queues and tasks are the parent's."""
    global _pools_lock
    _pools_lock = threading.RLock()
    for pool in _pools.values():
        pool.is_replaced = True
    _pools.clear()
