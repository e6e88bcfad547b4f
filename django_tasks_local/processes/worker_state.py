"""
WorkerState is the state machine of one worker, with its legal moves and the deadline of its state.

The docstring of the module worker_process shows the moves.
"""

from __future__ import annotations

import threading
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

# Seconds from the start of a worker until it is ready: a warning is logged, the worker is ended.
START_WARNING_SECONDS = 30.0
START_SECONDS = 300.0


class State(Enum):
    """Lists the states of a worker; worker_process shows the moves between them."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    ENDING = "ending"  # It gets no further task and will end.
    DEAD = "dead"


_LEGAL_MOVES = {
    State.STARTING: (State.IDLE, State.ENDING, State.DEAD),
    State.IDLE: (State.BUSY, State.ENDING, State.DEAD),
    # BUSY to BUSY sets the deadline of the next task.
    State.BUSY: (State.IDLE, State.BUSY, State.ENDING, State.DEAD),
    # ENDING to ENDING changes the deadline at SIGTERM, SIGKILL or the end of the socket.
    State.ENDING: (State.ENDING, State.DEAD),
    State.DEAD: (),
}
_SERVING = (State.STARTING, State.IDLE, State.BUSY)


class WorkerState:
    """Holds the state of a worker and its deadline. Methods may be called from any thread."""

    def __init__(self, worker_id: str, clock: Callable[[], float]) -> None:
        self.worker_id = worker_id
        self._clock = clock
        # Guards: the state. Reentrant, because a finalizer that runs while this thread holds it may
        # enqueue a task.
        self.lock = threading.RLock()
        self._state = State.STARTING
        self.idle_timeout: float | None = None  # the seconds after which an idle worker ends
        # Only _move() sets `terminated`; only _move(), limit() and postpone() set `deadline`. At
        # this time deadlines.act_on_deadline() must run.
        self.deadline: float | None = clock() + START_WARNING_SECONDS
        self.terminated = False
        self.recall_at: float | None = None  # when to call WorkerProcess.recall()

    def _move(
        self,
        to: State,
        *,
        seconds: float | None = None,
        terminated: bool = False,
    ) -> None:
        """Change the state and the deadline. Raises RuntimeError for an illegal move."""
        with self.lock:
            if to not in _LEGAL_MOVES[self._state]:
                raise RuntimeError(
                    f"The worker {self.worker_id} cannot move from {self._state} to {to}."
                )
            self._state = to
            if to is State.IDLE:
                seconds = self.idle_timeout
            self.deadline = None if seconds is None else self._clock() + seconds
            self.terminated |= terminated

    @property
    def state(self) -> State:
        """Return the present state; another thread may change it at any time."""
        return self._state

    def counts_as_serving(self) -> bool:
        """Return whether the worker counts against MAX_WORKERS: it is starting, idle or busy."""
        return self._state in _SERVING

    def has_expired(self, now: float) -> bool:
        """Return whether the deadline, or the time to take back waiting tasks, has passed."""
        if self.deadline is not None and self.deadline <= now:
            return True
        return self.recall_at is not None and self.recall_at <= now

    def postpone(self, seconds: float) -> None:
        """Move the deadline, and the time to take back waiting tasks, by this many seconds."""
        with self.lock:
            if self.deadline is not None:
                self.deadline += seconds
            if self.recall_at is not None:
                self.recall_at += seconds

    def limit(self, seconds: float | None) -> None:
        """Set the deadline of a starting or busy worker, or remove it."""
        with self.lock:
            if self._state is State.STARTING or self._state is State.BUSY:
                self.deadline = None if seconds is None else self._clock() + seconds
