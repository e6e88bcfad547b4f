"""
Hold the open track() loops of one task, and compute the values that its progress bar shows.

    for page in track(pages):       outermost: the bar shows its count, total, unit and rate
        for row in track(page):     innermost: report_progress() stores values here

A loop inside another one adds its own fraction to the percentage of the outer loop's current step.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from .rate import Rate, percent_of

if TYPE_CHECKING:
    from ..aliases import Number

# The loop in which the present code runs. Threads and asyncio tasks copy it with their context, so
# two loops of asyncio.gather() have the loop around gather() as parent, and not each other.
_current_loop: ContextVar[LoopProgress | None] = ContextVar("current_loop", default=None)


class LoopProgress:
    """
    Holds the count, total, message and unit of one track() loop, or of a task outside of loops.

    The reporter's lock guards all attributes except `current` and `total`: a track() loop stores
    these two without the lock, because storing and reading an attribute is atomic.
    """

    __slots__ = (
        "current",
        "first_message",
        "floor",
        "is_open",
        "message",
        "parent",
        "rate",
        "total",
        "unit",
    )

    def __init__(
        self,
        current: Number | None,
        total: Number | None,
        message: str | None = None,
        unit: str = "",
    ) -> None:
        self.current = current
        self.total = total
        self.message = self.first_message = message  # None: the bar shows the outer loop's message.
        self.unit = unit
        self.is_open = False
        # The loop around this one. It may be a loop of another task, whose step has enqueued this
        # task with the ImmediateBackend, which runs a task in the context of its caller.
        self.parent: LoopProgress | None = None
        self.rate = Rate()
        # The highest percentage so far, with the total and the count to which it belongs.
        self.floor: tuple[Number | None, Number, float] | None = None


# The values that the bar shows: the outermost loop, its count and total, the percentage, the
# message, the unit and the levels. This is no NamedTuple, because a plain tuple is created faster.
type Shown = tuple[
    LoopProgress,
    Number | None,
    Number | None,
    float | None,
    str,
    str,
    list[dict[str, Any]],
]


class Loops:
    """
    Knows the open loops of one task. Called from: any thread that holds the reporter's lock.

    Loops may end in any order, because coroutines of one task may run overlapping loops. A
    finalizer may begin and end a loop between any two lines.
    """

    __slots__ = ("_open", "_outermost", "innermost")

    def __init__(self) -> None:
        self._open: list[LoopProgress] = []  # in order of their beginning
        # Outside of loops, report() stores values in the loop that was the outermost one last; in
        # the first object, of the task itself, if there was no loop.
        self._outermost = self.innermost = LoopProgress(None, 100, "")

    def __bool__(self) -> bool:
        """Return whether a loop is open."""
        return bool(self._open)

    def begin(self, loop: LoopProgress, now: float) -> None:
        """Open `loop` at time `now`, inside the loop in which the calling code runs."""
        parent = _current_loop.get()
        # Skip loops that have ended. end() does not set `_current_loop` back, because asyncio may
        # call it in another context, after a `break` in an `async for`.
        while parent is not None and not parent.is_open:
            parent = parent.parent
        loop.parent = parent
        loop.is_open = True
        loop.rate.start(now)
        if not self._open:
            if loop.message is None:
                loop.message = loop.first_message = self._outermost.message
            self._outermost = loop
        self._open.append(loop)
        self.innermost = loop
        _current_loop.set(loop)

    def end(self, loop: LoopProgress) -> None:
        """
        Close `loop` if it is open; the bar shows the loop around it again.

        A message that the task reported inside the innermost loop stays.
        """
        if loop not in self._open:
            return
        self._open.remove(loop)
        loop.is_open = False
        if self.innermost is loop:
            self._go_out_to(self._open[-1] if self._open else self._outermost)

    def end_all(self) -> None:
        """Close all loops, because the task has ended."""
        if self._open:
            for loop in self._open:
                loop.is_open = False
            self._open.clear()
            self._go_out_to(self._outermost)

    def _go_out_to(self, outer: LoopProgress) -> None:
        if self.innermost.message is not self.innermost.first_message:
            outer.message = self.innermost.message
        self.innermost = outer

    def shown(self) -> Shown:
        """Return the values that the bar shows now."""
        loops = tuple(self._open)
        if len(loops) > 1:
            return self._shown_of_several(loops)
        loop = loops[0] if loops else self._outermost
        current, total = loop.current, loop.total
        percent = percent_of(current, total)
        # The task outside of loops has no floor: its percentage falls if the task reports that.
        if percent is not None and (loops or loop.floor is not None):
            percent = self._not_below_floor(loop, current, total, percent)
        message = self._outermost.message if loop.message is None else loop.message
        return loop, current, total, percent, message or "", loop.unit, []

    def _shown_of_several(self, loops: tuple[LoopProgress, ...]) -> Shown:
        message = self._outermost.message
        levels = []
        for loop in loops:
            if loop.message is not None:
                message = loop.message
            levels.append((loop.message or "", loop.current, loop.total, loop.unit))
        _, current, total, unit = levels[0]
        percent: float | None = None
        # The part of a loop's present step that its first inner loop has done, from 0 to 1. A loop
        # begins after its parent, so this visits the loops from the last one to the first one.
        done: dict[LoopProgress | None, float] = {}
        for loop, level in zip(reversed(loops), reversed(levels), strict=True):
            steps = None if level[1] is None else level[1] + done.get(loop, 0)
            percent = percent_of(steps, level[2])
            done[loop.parent] = (percent or 0) / 100
        if percent is not None:
            percent = self._not_below_floor(loops[0], current, total, percent)
        names = ("message", "current", "total", "unit")
        described = [dict(zip(names, level, strict=True)) for level in levels]
        return loops[0], current, total, percent, message or "", unit, described

    def _not_below_floor(
        self, loop: LoopProgress, current: Number | None, total: Number | None, percent: float
    ) -> float:
        """
        Return `percent`, or the highest one so far of this loop with this total.

        The fraction of an inner loop is lost when that loop ends, and overlapping inner loops
        advance differently. Outside of loops a count that falls is the task's own report.
        """
        count = current or 0
        floor = loop.floor
        if (
            floor is not None
            and percent < floor[2]
            and floor[0] == total
            and (self._open or count >= floor[1])
        ):
            percent = floor[2]
        loop.floor = (total, count, percent)
        return percent
