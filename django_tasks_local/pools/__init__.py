"""One pool for each backend alias and process: enqueue, queue, outcome."""

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
# Guards `_pools`, so that the first tasks of several threads find one pool.
_pools_lock = threading.RLock()


def pool_for(
    pool_class: type[Pool[Any, Any]], sender: type, alias: str, options: Options
) -> Pool[Any, Any]:
    """Return the pool of a backend alias in this process, created at the first call."""
    key = (sender, alias, options)
    pool = _pools.get(key)
    if pool is None:
        with _pools_lock:
            pool = _pools.get(key)
            if pool is None:
                pool = _pools[key] = pool_class(sender, alias, options)
    return pool


def all_pools() -> list[Pool[Any, Any]]:
    """Return the pools of this process that serve an alias."""
    return list(_pools.values())


def discard_all() -> None:
    """Discard all pools; the next task of an alias starts a new one. Called from any thread."""
    with _pools_lock:
        pools = all_pools()
        for pool in pools:
            pool.is_replaced = True  # first, for the child of a concurrent fork()
        _pools.clear()
    for pool in pools:
        pool.discard()
        shutdown.unregister(pool)


@receiver(setting_changed, dispatch_uid="django_tasks_local.setting_changed")
def _on_setting_changed(*, setting: str, **kwargs: Any) -> None:
    """Discard the pools when a test changes TASKS, as Django does with its backends."""
    if setting == "TASKS":
        discard_all()


@reset_in_child
def _forget_pools() -> None:
    """In a child of fork() the threads, the queue and the tasks are the parent's."""
    global _pools_lock
    _pools_lock = threading.RLock()
    for pool in _pools.values():
        pool.is_replaced = True
    _pools.clear()
