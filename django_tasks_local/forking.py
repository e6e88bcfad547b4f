"""
This module resets the state of this package in a child of fork(). It imports only `logs`.

The child has copies of the parent's locks, queues and tasks, but only the thread that called
fork(). So each module that keeps state for the process registers a function that resets this state.
"""

import os
from collections.abc import Callable

from .logs import get_logger

logger = get_logger(__name__)

_resets: list[Callable[[], object]] = []


def reset_in_child[ResetT: Callable[[], object]](reset: ResetT) -> ResetT:
    """
    Call `reset` in each child of fork(), after the functions that are already registered.

    This may be used as a decorator. On systems without os.register_at_fork(), such as Windows, no
    process forks and `reset` is never called.
    """
    _resets.append(reset)
    return reset


def _reset_all() -> None:
    for reset in _resets:
        try:
            reset()
        except BaseException:
            # Other modules still have copies of the parent's locks, so the loop must continue and
            # call their functions too.
            logger.exception("%r failed in the child of a fork().", reset)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
