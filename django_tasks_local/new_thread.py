"""new_thread() creates each thread of this package, with a name and an empty context."""

from __future__ import annotations

import sys
import threading
from contextvars import Context
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def new_thread(name: str, target: Callable[..., object], *args: object) -> threading.Thread:
    """
    Return a daemon thread that has not started; it will call `target` in an empty context.

    Python 3.14 starts a thread in a copy of its starter's context, by default on builds without a
    GIL. A thread of this package serves many tasks, so it must not keep alive or see the context
    variables of the task or request whose call has started it.
    """
    if sys.version_info >= (3, 14):
        return threading.Thread(target=target, name=name, args=args, daemon=True, context=Context())
    return threading.Thread(target=target, name=name, args=args, daemon=True)
