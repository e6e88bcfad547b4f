"""Calls a function at each point of an operation where other code may run in between."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interruption:
    """Calls a function once, in the thread of the operation, at the beginning or end of a call."""

    def __init__(self, at: int, modules: tuple[str, ...]) -> None:
        self._at = at  # the number of such points in `modules` before this one
        self._modules = modules
        self.was_reached = False

    @contextmanager
    def by(self, action: Callable[[], object]) -> Iterator[None]:
        """
        Call `action` during the `with` block, or at its end if the block has fewer calls.

        Finalizers and signal handlers run at calls, and other threads may run there.
        """
        seen = 0

        def profile(frame: FrameType, what: str, argument: Any) -> None:
            nonlocal seen
            # The interpreter runs other code when a function begins and when a C function returns.
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
    Yield an interruption at the first call of an operation, at the second, and so on.

    Only calls of functions in modules whose names begin with one of `modules` count.
    """
    at = 0
    while True:
        interruption = Interruption(at, modules)
        yield interruption
        if not interruption.was_reached:
            assert at > 0, "The operation called nothing in these modules."
            return
        at += 1
