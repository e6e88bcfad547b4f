"""The queue of a pool: first in, first out, and out of the middle when a task is cancelled."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator


class Waiting(Protocol):
    """An entry of a queue; a Job is one."""

    result_id: str
    position: int


class JobQueue[WaitingT: Waiting]:
    """
    The jobs that wait. Methods may be called from any thread.

    A deque would have to be searched for a job that was cancelled, or keep it, with its arguments,
    until the workers get to it. There is no lock (see ResultStore): each step that changes the
    entries is a single one, and so atomic.
    """

    def __init__(self) -> None:
        self._jobs: OrderedDict[str, WaitingT] = OrderedDict()

    def append(self, job: WaitingT) -> None:
        """Put a job at the end."""
        self._jobs[job.result_id] = job

    def appendleft(self, job: WaitingT) -> None:
        """
        Put a job back to the front.

        Two steps, so for the only thread that takes jobs out, and a job that nobody discards
        meanwhile.
        """
        self._jobs[job.result_id] = job
        self._jobs.move_to_end(job.result_id, last=False)

    def popleft(self) -> WaitingT:
        """Take out the first job. Raises IndexError when there is none, as a deque does."""
        try:
            return self._jobs.popitem(last=False)[1]
        except KeyError:
            raise IndexError("The queue is empty.") from None

    def discard(self, job: WaitingT) -> None:
        """Take out this job, if it is there."""
        self._jobs.pop(job.result_id, None)

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[WaitingT]:
        """Iterate over a copy, which is made in one step."""
        return iter(list(self._jobs.values()))
