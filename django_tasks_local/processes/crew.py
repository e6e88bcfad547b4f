"""Start, replace, retire and terminate the worker processes of one pool."""

from __future__ import annotations

from contextlib import ExitStack
from traceback import format_exc
from typing import TYPE_CHECKING

from ..clocks import Clocks
from ..exceptions import WorkerDied
from ..execution import Outcome
from .deadlines import act_on_deadline
from .worker_process import ACKNOWLEDGE_SECONDS, KILL_AFTER
from .worker_state import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..conf import ProcessOptions
    from ..pools.base import Pool
    from .assigning import Assigner
    from .starting import Starter
    from .task import ProcessTask
    from .worker_process import WorkerProcess

MAX_SENDS = 3  # A task fails after this many workers died before they started it.


class Crew:
    """
    Holds the worker processes of one pool, and starts and ends them.

    Called from: the dispatcher's thread, unless a method states "any thread". The Crew calls
    `listen(worker, undo)` for each new worker; `listen` registers in `undo` how to stop listening.
    """

    def __init__(
        self,
        pool: Pool[ProcessOptions, ProcessTask],
        starter: Starter,
        assigner: Assigner,
        listen: Callable[[WorkerProcess, ExitStack], object],
    ) -> None:
        self._pool = pool
        self._starter = starter
        self._assigner = assigner
        self._listen = listen
        self._workers: set[WorkerProcess] = set()
        self._size = 0  # start_missing() keeps this many workers running.
        self._settings_version = 0  # outdate() adds 1: only later workers have its settings.
        self.closing = False

    def workers(self) -> list[WorkerProcess]:
        """Return all workers, also those that are ending. Called from: any thread."""
        return list(self._workers)

    def __contains__(self, worker: object) -> bool:
        """Return whether the pool has started this worker and not yet removed it."""
        return worker in self._workers

    def __len__(self) -> int:
        """Return the number of workers, also of those that are ending."""
        return len(self._workers)

    def can_grow(self) -> bool:
        """Return whether fewer than MAX_WORKERS workers run tasks or are starting."""
        return self._serving() < self._pool.options.max_workers

    def _serving(self) -> int:
        return sum(worker.counts_as_serving() for worker in self._workers)

    def next_deadline(self, now: float) -> float | None:
        """Return when to check the deadlines of the workers again; None without workers."""
        if not self._workers:
            return None
        # A thread that gives a task to an idle worker does not wake the dispatcher, so it checks
        # regularly whether the workers have acknowledged their tasks.
        due_at = now + ACKNOWLEDGE_SECONDS
        for worker in self._workers:
            for at in (worker.deadline, worker.recall_at):
                if at is not None and at < due_at:
                    due_at = at
        return due_at

    def postpone(self, seconds: float) -> None:
        """Postpone all deadlines, because for `seconds` no process could work towards them."""
        for worker in self._workers:
            worker.postpone(seconds)

    # Methods that start workers

    def start_missing(self) -> None:
        """Start workers to replace ended ones and to run waiting tasks, at most MAX_WORKERS."""
        most = self._pool.options.max_workers
        waiting, serving = len(self._pool.queue), self._serving()
        if waiting and self._size < most:
            starting = sum(worker.state is State.STARTING for worker in self._workers)
            self._size = min(most, max(self._size, serving + waiting - starting))
        for _ in range(self._size - serving):
            if self.closing or not self._starter.is_due():
                return
            self._start_worker()

    def _start_worker(self) -> None:
        version = self._settings_version
        try:
            with ExitStack() as undo:
                worker = self._starter.start()
                # The worker ends if this end of its socket is closed.
                undo.callback(worker.connection.close)
                self._listen(worker, undo)
                undo.pop_all()
        except Exception:  # noqa: BLE001 - enqueue() reports any error to its caller
            error = format_exc()
        else:
            worker.idle_timeout = self._pool.options.idle_timeout
            self._workers.add(worker)
            # If outdate() was called concurrently, it did not find this worker.
            if version != self._settings_version:
                worker.is_outdated = True
            return
        # Give up outside of the `except` block, so that this exception does not become the
        # __context__ of the errors of waiting tasks.
        if self._starter.on_refusal(error):
            self._give_up(error)

    def _give_up(self, error: str) -> None:
        """Refuse new tasks and fail the waiting ones, unless some worker has been ready."""
        if any(worker.was_ready for worker in self._workers):
            return
        self._size = 0
        self._starter.refuse_tasks(error)
        reason = f"No worker process could be started.\n{error}"
        while (task := self._assigner.next_task()) is not None:
            self._pool.fail_waiting(task, WorkerDied(reason))

    def on_ready(self, worker: WorkerProcess) -> None:
        """Give tasks to a worker that has set up Django."""
        self._starter.on_ready()
        worker.become_ready()
        self.offer(worker)

    def offer(self, worker: WorkerProcess) -> None:
        """Give waiting tasks to a worker, or retire it if it must not get another task."""
        if not worker.is_working():
            return
        if worker.must_retire(self._pool.options.max_tasks_per_worker):
            worker.retire()
        else:
            self._assigner.refill(worker)

    # Methods that end workers

    def outdate(self) -> None:
        """Give the present workers no further task. Called from: any thread."""
        self._settings_version += 1
        for worker in self.workers():
            worker.is_outdated = True

    def act_on_deadline(self, worker: WorkerProcess) -> None:
        """Take back the tasks that wait in a worker, and act on its deadline if this has passed."""
        self._assigner.recall(worker)
        if worker.deadline is not None and worker.deadline <= Clocks.monotonic():
            if worker.state is State.IDLE:
                self._retire_idle(worker)
            else:
                act_on_deadline(worker, self._pool.options.timeout)

    def _retire_idle(self, worker: WorkerProcess) -> None:
        """End a worker that has waited for IDLE_TIMEOUT seconds; a later task starts another."""
        worker.retire()
        if not worker.counts_as_serving():  # No other thread has given it a task concurrently.
            self._size -= 1
            self._assigner.remove_idle(worker)

    def retire_outdated(self) -> None:
        """End the workers whose settings are outdated; busy ones end after their task."""
        for worker in self.workers():
            if not worker.is_outdated:
                continue
            self._assigner.recall(worker)
            if worker.state is State.STARTING:
                self.terminate(worker)
            else:
                worker.retire()
                self._assigner.remove_idle(worker)

    def stop_running(self, worker: WorkerProcess, task: ProcessTask, error: BaseException) -> bool:
        """Stop a worker that runs this task; return False if the task was recalled from it."""
        self._assigner.recall(worker)
        if task not in worker.tasks:
            return False
        # If the worker has begun a later task, `task` has ended: the worker sends its Result
        # together with the Started of the later task.
        if worker.tasks[-1] is task:
            self.terminate(worker, error, task)
        return True

    def terminate(
        self,
        worker: WorkerProcess,
        reason: BaseException | None = None,
        task: ProcessTask | None = None,
    ) -> None:
        """Send SIGTERM to a worker. The `task` that it runs fails with `reason`."""
        # Recall the tasks first: otherwise the worker could begin one of them before SIGTERM
        # arrives, and SIGTERM would cancel it.
        self._assigner.recall(worker)
        worker.terminate(reason, task)
        self._assigner.remove_idle(worker)

    def close(self) -> None:
        """Ask idle workers to end, terminate the others, and start no further workers."""
        self.closing = True
        for worker in self.workers():
            self._assigner.recall(worker)
            worker.retire(KILL_AFTER)
            if worker.counts_as_serving():
                self.terminate(worker)
            self._assigner.remove_idle(worker)

    def abandon(self, error: BaseException, call: Callable[..., object]) -> None:
        """
        End all workers and fail all tasks, because `error` ends the dispatcher's thread.

        `call` calls a function and logs its exception, so that each step runs whatever the others
        raise. The cause may be a closed file descriptor, which other steps need as well.
        """
        description = Outcome.failure(error)
        assert description.error is not None
        reason = WorkerDied(
            f"The dispatcher of the worker processes has ended because of an error: "
            f"{description.error.exception_class_path}: {description.message}"
        )
        self.closing = True
        workers = self.workers()
        for worker in workers:
            call(self.terminate, worker)
        call(self._assigner.assign)  # It puts back the tasks that an exception has interrupted.
        for task in self._pool.queue:
            call(self._pool.fail_waiting, task, reason)
        for worker in workers:
            call(self.remove, worker)  # It waits for the process, and kills it if it does not end.
            for task in list(worker.tasks):
                call(self._pool.finish, task, Outcome.failure(reason))

    def remove(self, dead: WorkerProcess) -> str:
        """Remove a dead worker; return a sentence with its exit code or signal."""
        self._assigner.recall(dead)
        self._assigner.remove_idle(dead)
        self._workers.discard(dead)
        death = dead.bury()
        if dead.never_became_ready() and not dead.tasks:
            error = dead.start_error or f"{death} before it was ready."
            if self._starter.on_death(error, has_reported=dead.start_error is not None):
                self._give_up(error)
        return death

    def resolve(self, task: ProcessTask, dead: WorkerProcess, death: str) -> None:
        """Requeue a task of a dead worker if it may start elsewhere; else fail it."""
        reason = dead.reason if dead.stopped_task is task else None
        if reason is None and not task.has_started and task.sends < MAX_SENDS:
            self._assigner.requeue(task)
        else:
            what = "while it ran the task" if task.has_started else "before the task started"
            error = reason or WorkerDied(f"{death} {what}.")
            self._pool.finish(task, Outcome.failure(error))
