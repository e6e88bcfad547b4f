"""
The one hook for a child of fork(). Imports nothing of this package.

The child has copies of the parent's locks, queues and tasks, but none of its threads. So each
module that keeps state for the process registers a function that resets this state.
"""

import logging
import os
from collections.abc import Callable

logger = logging.getLogger(__name__)

_resets: list[Callable[[], object]] = []


def reset_in_child[ResetT: Callable[[], object]](reset: ResetT) -> ResetT:
    """
    Call `reset` in each child of fork(), after the functions that are already registered.

    A decorator. Where os.register_at_fork() is missing, as on Windows, nothing is ever called.
    """
    _resets.append(reset)
    return reset


def _reset_all() -> None:
    for reset in _resets:
        try:
            reset()
        except BaseException:
            # The other modules still hold the parent's locks, so their functions must run too.
            logger.exception("%r failed in the child of a fork().", reset)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_all)
