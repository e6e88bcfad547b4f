"""
Track one worker process in its parent: its state, and the tasks that were sent to it.

    STARTING --ready--> IDLE --give()--> BUSY --the last result--> IDLE
        |                 |                |
        |   retire(), terminate(), the socket is closed, a deadline passes
        +-----------------+----------------+
                                           v
                                        ENDING --the process has ended--> DEAD

Any thread may call give(), because the thread that enqueues a task sends it to an idle worker
itself; so a lock guards the state. Only the dispatcher's thread calls the other methods that change
the state.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from ..clocks import Clocks
from ..exceptions import TaskCancelled
from . import facilities
from .ending import end_and_describe
from .frames import CANCEL
from .lifeline import kill_group
from .wire import frame_task
from .worker_state import State, WorkerState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from multiprocessing.process import BaseProcess

    from .connection import WorkerConnection
    from .task import ProcessTask
    from .wire import Result

# Seconds until a worker that does not read its task is killed, and another one gets the task.
ACKNOWLEDGE_SECONDS = 5.0
# Seconds after which a warning is logged that a worker still imports a task's module.
IMPORT_WARNING_SECONDS = 30.0
# Seconds after TIMEOUT by which the worker itself has reported that its task takes too long, if any
# of its threads can run: a call in C may hold the GIL.
FALLBACK_SECONDS = 5.0
KILL_AFTER = 0.5  # seconds from SIGTERM to SIGKILL
PATIENCE = 0.005  # seconds after which the dispatcher takes back tasks that it has sent ahead
RETIRE_TIME = 5.0  # seconds from retire() to SIGTERM for an idle worker that does not end


class WorkerProcess(WorkerState):
    """Holds a worker's process and connection, its state and the tasks that were sent to it."""

    def __init__(
        self,
        worker_id: str,
        process: BaseProcess,
        connection: WorkerConnection,
        clock: Callable[[], float] = Clocks.monotonic,
    ) -> None:
        super().__init__(worker_id, clock)
        self.process = process
        self.connection = connection
        # The tasks that were sent to the worker and have no outcome, in the order of their runs.
        self.tasks: deque[ProcessTask] = deque()
        self.completed = 0  # the number of its tasks that have ended
        self.was_ready = False
        self.is_outdated = False  # True if later tasks need other settings.
        self.start_error: str | None = None  # the traceback if the worker cannot set up Django
        # The worker has acknowledged its first task, and imports the task's module.
        self.is_importing = False
        self.has_warned = False  # True after a warning that the worker takes long to be ready.
        # Only terminate() sets `reason` and `stopped_task`.
        self.reason: BaseException | None = None  # why `stopped_task` was stopped
        self.stopped_task: ProcessTask | None = None

    # Methods that read the state

    @property
    def first_task(self) -> ProcessTask | None:
        """Return the task that the worker runs or will run first; None if it has no task."""
        tasks = self.tasks
        return tasks[0] if tasks else None

    def is_available(self) -> bool:
        """Return whether give() may send tasks: the worker is idle and not outdated."""
        return self._state is State.IDLE and not self.is_outdated

    def is_working(self) -> bool:
        """Return whether the worker is idle or busy."""
        return self._state is State.IDLE or self._state is State.BUSY

    def never_became_ready(self) -> bool:
        """Return whether the worker has never been ready, and not because it had to end."""
        return not self.was_ready and (not self.terminated or self.start_error is not None)

    def has_ended(self) -> bool:
        """Return whether the process has ended, also if its sentinel does not show this."""
        return self._state is State.ENDING and self.process.exitcode is not None

    def must_retire(self, max_tasks: int | None) -> bool:
        """Return whether the worker must end: it has run `max_tasks` tasks or is outdated."""
        return self.is_outdated or (max_tasks is not None and self.completed >= max_tasks)

    def overrules(self, result: Result) -> bool:
        """
        Return whether the first task fails with `reason`, whatever Result the worker has sent.

        A task that catches its cancellation and returns a value is successful nevertheless.
        """
        if self.reason is None or self.stopped_task is not self.first_task:
            return False
        return result.error is not None or not isinstance(self.reason, TaskCancelled)

    # Methods that change the state

    def become_ready(self) -> None:
        """Note that the worker has set up Django, so that it can get tasks."""
        self.was_ready = True
        if self._state is State.STARTING:
            self._move(State.IDLE)

    def give(self, tasks: Sequence[ProcessTask]) -> bool:
        """
        Send tasks to an idle worker; return False if it is no longer available.

        Called from: any thread that has popped this worker from the Assigner's idle workers.
        """
        with self.lock:
            if not self.is_available():
                return False
            # Move before send(), because the first Result may arrive before send() returns.
            self._move(State.BUSY, seconds=ACKNOWLEDGE_SECONDS)
            tasks[0].ticket = 0
            self._number(tasks[1:])
            self._send(tasks)
            return True

    def give_ahead(self, tasks: Sequence[ProcessTask]) -> bool:
        """Send further tasks to a busy worker; return False if it must get no task."""
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
        """Issue a ticket for each task that give() or give_ahead() sends ahead."""
        if tasks:
            assert self.connection.tickets is not None
            for task, ticket in zip(tasks, self.connection.tickets.issue(len(tasks)), strict=True):
                task.ticket = ticket

    def recall(self, last: ProcessTask | None = None) -> list[ProcessTask]:
        """
        Take back and return the tasks that the worker has not begun; with `last`, those up to it.

        After recall(), the worker can begin only the tasks that are left in `tasks`. If the last
        task of these has not ended, the worker runs this task or will begin it.
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
        with self.lock:  # Another thread may be in give() of this worker.
            if not self.tasks and self._state is State.BUSY:
                self._move(State.IDLE)
            if last is None or len(self.tasks) <= 1:
                self.recall_at = None
        return recalled

    def _limit_wait(self) -> None:
        """Set `recall_at`, so that tasks sent ahead do not wait long behind the first task."""
        waits = len(self.tasks) > 1
        self.recall_at = self._clock() + PATIENCE if waits else None

    def acknowledge_first(self) -> None:
        """Note that the worker has read the first task, and now imports the task's module."""
        self.is_importing = True
        self.limit(IMPORT_WARNING_SECONDS)

    def start_first(self, timeout: float | None) -> None:
        """Note that the first task has started, and may take `timeout` seconds."""
        task = self.tasks[0]
        task.has_started = True
        task.body = b""  # The task will not be sent again.
        self.is_importing = False
        # The worker's own clock decides about TIMEOUT; this deadline is for a worker that cannot.
        self.limit(None if timeout is None else timeout + FALLBACK_SECONDS)
        self._limit_wait()

    def end_first(self) -> None:
        """Remove the first task, which has ended; make a busy worker without further tasks idle."""
        self.tasks.popleft()
        self.completed += 1
        if self._state is State.BUSY:
            if self.tasks:
                self._move(State.BUSY, seconds=ACKNOWLEDGE_SECONDS)
            else:
                self._move(State.IDLE)
        self._limit_wait()

    def retire(self, seconds: float = RETIRE_TIME) -> None:
        """
        Ask an idle worker to end, by closing its input, the socket; do nothing for a busy worker.

        If the worker still runs after `seconds`, act_on_deadline() terminates it.
        """
        with self.lock:
            if self._state is not State.IDLE:
                return  # The worker is busy, or is ending already.
            self._move(State.ENDING, seconds=seconds)
        self.connection.stop_sending()

    def terminate(
        self, reason: BaseException | None = None, task: ProcessTask | None = None
    ) -> None:
        """
        Cancel the running task and end the worker; note that `task` fails with `reason`.

        The worker gets SIGTERM. Where SIGTERM would end it at once, a worker with a task gets the
        frame CANCEL instead.
        """
        if not self.terminated and self._state is not State.DEAD:
            if reason is not None:
                self.reason, self.stopped_task = reason, task
            self._move(State.ENDING, seconds=KILL_AFTER, terminated=True)
            if facilities.HANDLES_SIGTERM or not self.tasks:
                self.process.terminate()
            else:
                self.connection.send(CANCEL)

    def note_end(self) -> None:
        """Give no further task to a worker that has died or closed its side of the socket."""
        with self.lock:
            self._move(State.ENDING, seconds=KILL_AFTER)
            self.connection.discard_unsent()

    def kill(self) -> None:
        """Send SIGKILL, without SIGTERM before it, or after SIGTERM had no effect."""
        self._move(State.ENDING, terminated=True)
        kill_group(self.process.pid)
        self.process.kill()

    def bury(self) -> str:
        """Close the connection of a dead worker; return a sentence with its exit code or signal."""
        self._move(State.DEAD)
        self.connection.close()
        return f"The worker process {self.worker_id} {end_and_describe(self.process, KILL_AFTER)}"
