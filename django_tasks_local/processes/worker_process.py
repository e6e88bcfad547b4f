"""
One worker process as its parent sees it: a state machine, and the tasks sent to it.

    STARTING --ready--> IDLE --give()--> BUSY --the last result--> IDLE
        |                 |                |
        |   retire(), terminate(), the socket is closed, a deadline passes
        +-----------------+----------------+
                                           v
                                        ENDING --the process has ended--> DEAD

Only give() is called from any thread, because the thread that enqueues a task hands it to an idle
worker itself; so a lock guards the state. All other methods are called in the dispatcher's thread.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from contextlib import suppress
from enum import Enum
from typing import TYPE_CHECKING

from ..exceptions import TaskCancelled, TaskTimeout
from .wire import frame_task

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.process import BaseProcess

    from .connection import WorkerConnection
    from .task import ProcessTask
    from .wire import Result

KILL_AFTER = 0.5  # seconds from SIGTERM to SIGKILL
PATIENCE = 0.005  # seconds that a task which was sent ahead waits for the one that runs
RETIRE_TIME = 5.0  # seconds for an idle worker to end after its socket was closed
LOST_EXIT_CODE = 255  # multiprocessing reports it if its fork server died: the real one is unknown


class State(Enum):
    """The states of a worker."""

    STARTING = "starting"
    IDLE = "idle"
    BUSY = "busy"
    ENDING = "ending"  # it was asked to end, or has closed its socket: it gets no further task
    DEAD = "dead"


_LEGAL_MOVES = {
    State.STARTING: (State.IDLE, State.ENDING, State.DEAD),
    State.IDLE: (State.BUSY, State.ENDING, State.DEAD),
    # BUSY to BUSY: a task has started, and its time is limited.
    State.BUSY: (State.IDLE, State.BUSY, State.ENDING, State.DEAD),
    # ENDING to ENDING: the next, harder way to end it, or its socket is closed.
    State.ENDING: (State.ENDING, State.DEAD),
    State.DEAD: (),
}
_SERVING = (State.STARTING, State.IDLE, State.BUSY)


class WorkerProcess:
    """A worker, its state and its tasks."""

    def __init__(
        self,
        worker_id: str,
        process: BaseProcess,
        connection: WorkerConnection,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker_id = worker_id
        self.process = process
        self.connection = connection
        self._clock = clock
        # Guards the state. Reentrant, because a finalizer that runs while this thread holds it may
        # enqueue.
        self.lock = threading.RLock()
        self._state = State.STARTING
        # Sent to the worker, without outcome, in order: it runs the first one or is about to.
        self.tasks: deque[ProcessTask] = deque()
        self.completed = 0  # tasks
        self.was_ready = False
        self.is_outdated = False  # it has other settings than the next task needs
        self.start_error: str | None = None  # the traceback, if Django could not be set up there
        self._timeout: float | None = None  # of the running task, in seconds
        # Set by _move() only.
        self.deadline: float | None = None  # of the running task, or of the end in ENDING
        self.terminated = False
        # Set by terminate() only.
        self.reason: BaseException | None = None  # why `stopped_task` was stopped
        self.stopped_task: ProcessTask | None = None
        self.recall_at: float | None = None  # when tasks that were sent ahead are to be taken back

    # The state

    def _move(
        self,
        to: State,
        *,
        seconds: float | None = None,
        terminated: bool = False,
    ) -> None:
        """Change the state, for at most `seconds`. Raises RuntimeError for an illegal move."""
        with self.lock:
            if to not in _LEGAL_MOVES[self._state]:
                raise RuntimeError(
                    f"The worker {self.worker_id} cannot move from {self._state} to {to}."
                )
            self._state = to
            self.deadline = None if seconds is None else self._clock() + seconds
            self.terminated |= terminated

    @property
    def state(self) -> State:
        """The state that the last move has led to."""
        return self._state

    @property
    def first_task(self) -> ProcessTask | None:
        """The task that it runs or is about to run."""
        tasks = self.tasks
        return tasks[0] if tasks else None

    def is_available(self) -> bool:
        """Whether it can be given a task."""
        return self._state is State.IDLE and not self.is_outdated

    def is_working(self) -> bool:
        """Whether it runs tasks, or would run them."""
        return self._state is State.IDLE or self._state is State.BUSY

    def counts_as_serving(self) -> bool:
        """Whether it works or will work: it occupies one of MAX_WORKERS places."""
        return self._state in _SERVING

    def has_expired(self, now: float) -> bool:
        """Whether it has reached its deadline, or tasks that were sent ahead wait for too long."""
        if self.deadline is not None and self.deadline <= now:
            return True
        return self.recall_at is not None and self.recall_at <= now

    def never_became_ready(self) -> bool:
        """Whether it ended by itself before it could run a task."""
        return not self.was_ready and not self.terminated

    def must_retire(self, max_tasks: int | None) -> bool:
        """Whether it must get no further task, because of its age or its settings."""
        return self.is_outdated or (max_tasks is not None and self.completed >= max_tasks)

    def overrules(self, result: Result) -> bool:
        """
        Whether the first task fails for the reason that it was stopped for, whatever its result is.

        A task that has caught its cancellation and returned a value is successful all the same.
        """
        if self.reason is None or self.stopped_task is not self.first_task:
            return False
        return result.error is not None or not isinstance(self.reason, TaskCancelled)

    # Steps of its life

    def become_ready(self) -> None:
        """Note that Django is set up there."""
        self.was_ready = True
        if self._state is State.STARTING:
            self._move(State.IDLE)

    def give(self, tasks: Sequence[ProcessTask]) -> bool:
        """
        Send tasks to an idle worker; False if it is not available any longer.

        Called from any thread, for a worker that this thread has taken from the idle ones.
        """
        with self.lock:
            if not self.is_available():
                return False
            # Before the tasks are sent: the first result may arrive before send() returns here.
            self._move(State.BUSY)
            tasks[0].ticket = 0
            self._number(tasks[1:])
            self._send(tasks)
            return True

    def give_ahead(self, tasks: Sequence[ProcessTask]) -> bool:
        """Send further tasks to a busy worker; False if it must get none."""
        with self.lock:
            if self._state is not State.BUSY or self.is_outdated:
                return False
            self._number(tasks)
            self._send(tasks)
            return True

    def _send(self, tasks: Sequence[ProcessTask]) -> None:
        for task in tasks:
            task.sends += 1
            self.tasks.append(task)
        self._limit_wait()
        self.connection.send(b"".join(frame_task(task.body, task.ticket) for task in tasks))

    def _number(self, tasks: Sequence[ProcessTask]) -> None:
        """Issue tickets for tasks that are sent ahead."""
        if tasks:
            assert self.connection.tickets is not None
            for task, ticket in zip(tasks, self.connection.tickets.issue(len(tasks)), strict=True):
                task.ticket = ticket

    def recall(self, last: ProcessTask | None = None) -> list[ProcessTask]:
        """
        Take back the tasks that were sent ahead and not begun, with `last` only up to this one.

        Afterwards the worker can begin no other task than those in `tasks`. If the last one of
        these has not ended, it is the only one that the worker runs or is about to run.
        """
        recalled: list[ProcessTask] = []
        while self.connection.tickets is not None and (last is None or last in self.tasks):
            ticket = self.connection.tickets.take_back()
            if ticket is None:
                break
            [task] = [task for task in self.tasks if task.ticket == ticket]
            self.tasks.remove(task)
            task.sends -= 1
            recalled.append(task)
        with self.lock:  # Another thread may be giving it a task.
            if not self.tasks and self._state is State.BUSY:
                self._move(State.IDLE)
            if last is None or len(self.tasks) <= 1:
                self.recall_at = None
        return recalled

    def _limit_wait(self) -> None:
        """Limit how long tasks that were sent ahead wait behind the first one."""
        waits = len(self.tasks) > 1
        self.recall_at = self._clock() + PATIENCE if waits else None

    def start_first(self, timeout: float | None) -> None:
        """Note that the first task runs, and may run for `timeout` seconds."""
        task = self.tasks[0]
        task.has_started = True
        task.body = b""  # The task will not be sent again.
        if timeout is not None and self._state is State.BUSY:
            self._timeout = timeout
            self._move(State.BUSY, seconds=timeout)
        self._limit_wait()

    def end_first(self) -> None:
        """Forget the first task, which has a result; without another one the worker is idle."""
        self.tasks.popleft()
        self.completed += 1
        if self._state is State.BUSY:
            self._move(State.BUSY if self.tasks else State.IDLE)
        self._limit_wait()

    def retire(self) -> None:
        """Let an idle worker end: it reads the end of its socket. Without effect on a busy one."""
        with self.lock:
            if self._state is not State.IDLE:
                return  # Another thread has given it a task.
            self._move(State.ENDING, seconds=RETIRE_TIME)
        self.connection.stop_sending()

    def terminate(
        self, reason: BaseException | None = None, task: ProcessTask | None = None
    ) -> None:
        """Send SIGTERM, which cancels the task that it runs; `task` fails with `reason`."""
        if not self.terminated and self._state is not State.DEAD:
            if reason is not None:
                self.reason, self.stopped_task = reason, task
            self._move(State.ENDING, seconds=KILL_AFTER, terminated=True)
            self.process.terminate()

    def note_end(self) -> None:
        """Note that its side of the socket is closed: it has ended or is about to."""
        with self.lock:
            self._move(State.ENDING, seconds=KILL_AFTER)
            self.connection.discard_unsent()

    def act_on_deadline(self) -> None:
        """
        Stop a task that takes too long; terminate or kill a worker that does not end.

        Called after recall().
        """
        if self._state is not State.BUSY:
            if self.terminated:
                self._move(State.ENDING)
                self.process.kill()
            else:
                self.terminate()
        elif len(self.tasks) > 1:
            # It has begun the next task, so the first one has ended: its result comes together with
            # the report that the next one has started.
            self._move(State.BUSY)
        else:
            error = TaskTimeout(f"The task took longer than {self._timeout} seconds.")
            self.terminate(error, self.first_task)

    def wait_or_kill(self) -> None:
        """Wait for its end, for a short time, then kill it."""
        self.process.join(KILL_AFTER)
        self.process.kill()

    def bury(self) -> str:
        """Close everything that the parent holds of a dead worker; return how it ended."""
        self._move(State.DEAD)
        self.connection.close()
        return f"The worker process {self.worker_id} {_how_it_ended(self.process)}"


def _how_it_ended(process: BaseProcess) -> str:
    """Name the signal or the exit code, and free the descriptors of the process object."""
    process.join(KILL_AFTER)
    code = process.exitcode
    if code is None or code == LOST_EXIT_CODE:
        # multiprocessing's fork server was killed, so the exit code is lost; the worker must end.
        process.kill()
    with suppress(ValueError):  # It still runs.
        process.close()
    if code is not None and code < 0:
        with suppress(ValueError):
            return f"was killed by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
