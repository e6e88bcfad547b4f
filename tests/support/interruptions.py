"""
Interruption and each_call() call a function at each point of an operation where other code may run.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """
    Calls a function once during an operation, in its thread, when a function begins or a C function
    returns.
    """

    def __init__(self, at: int, modules: tuple[str, ...]) -> None:
        self._at = at  # the number of earlier points, counted in `modules`
        self._modules = modules
        self.was_reached = False

    @contextmanager
    def by(self, action: Callable[[], object]) -> Iterator[None]:
        """
        Call `action` during the `with` block, or after the block if the block has too few calls.

        The interpreter runs finalizers, signal handlers and other threads at calls, so `action` may
        stand for any code that interrupts the operation.
        """
        seen = 0

        def profile(frame: FrameType, what: str, argument: Any) -> None:
            nonlocal seen
            # The interpreter may run finalizers, signal handlers and other threads at these two
            # events.
            if what not in ("call", "c_return"):
                return
            if not frame.f_globals.get("__name__", "").startswith(self._modules):
                return
            if seen == self._at:
                sys.setprofile(None)
                self.was_reached = True
                action()
            seen += 1

        previous = sys.getprofile()
        sys.setprofile(profile)
        try:
            yield
        finally:
            sys.setprofile(previous)
        if not self.was_reached:
            action()


def each_call(modules: tuple[str, ...] = ("django_tasks_local.",)) -> Iterator[Interruption]:
    """
    Yield an Interruption at the first point of an operation, then at the second, up to the last.

    Only calls of functions in modules whose names begin with one of `modules` count.
    """
    at = 0
    while True:
        interruption = Interruption(at, modules)
        yield interruption
        if not interruption.was_reached:
            assert at > 0, "The operation called no function in these modules."
            return
        at += 1
