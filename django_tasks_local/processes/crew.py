"""All workers of one pool: how many there are, and the beginning and the end of each."""

from __future__ import annotations

from contextlib import ExitStack
from traceback import format_exc
from typing import TYPE_CHECKING

from ..exceptions import WorkerDied
from .worker_process import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from ..conf import ProcessOptions
    from ..pools.base import Pool
    from .assigning import Assigner
    from .starting import Starter
    from .task import ProcessTask
    from .worker_process import WorkerProcess


class Crew:
    """
    The workers. For the dispatcher's thread; a method for any thread is marked as such.

    `listen(worker, undo)` is called for each new worker; it adds its reverse to `undo`.
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
        self._size = 0  # workers to have: the largest number that was needed so far
        self._settings_version = 0  # raised when new workers need other settings than older ones
        self.closing = False

    def workers(self) -> list[WorkerProcess]:
        """Return all workers, those that end included. Called from any thread."""
        return list(self._workers)

    def __contains__(self, worker: object) -> bool:
        """Whether a worker was not removed yet."""
        return worker in self._workers

    def __len__(self) -> int:
        """Return the number of workers, those that end included."""
        return len(self._workers)

    def can_grow(self) -> bool:
        """Whether another worker may be started, now or later."""
        return self._serving() < self._pool.options.max_workers

    def _serving(self) -> int:
        return sum(worker.counts_as_serving() for worker in self._workers)

    # The beginning

    def start_missing(self) -> None:
        """Start workers: in place of those that have ended, and for waiting tasks."""
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
        except Exception:  # noqa: BLE001 - whatever it is, enqueue() reports it to its caller
            error = format_exc()
        else:
            self._workers.add(worker)
            # If outdate() was called concurrently, it did not find this worker.
            if version != self._settings_version:
                worker.is_outdated = True
            return
        # Outside of the `except` block, so that this exception does not become the __context__ of
        # the errors of waiting tasks.
        if self._starter.on_refusal(error):
            self._give_up(error)

    def _give_up(self, error: str) -> None:
        """Fail the waiting tasks, unless a worker is left that can run them."""
        if any(worker.was_ready for worker in self._workers):
            return
        self._size = 0
        self._starter.refuse_tasks(error)
        reason = f"No worker process could be started.\n{error}"
        while (task := self._assigner.next_task()) is not None:
            self._pool.fail_waiting(task, WorkerDied(reason))

    def on_ready(self, worker: WorkerProcess) -> None:
        """A worker has set up Django: let it be given tasks."""
        self._starter.on_ready()
        worker.become_ready()
        self.offer(worker)

    def offer(self, worker: WorkerProcess) -> None:
        """Let a worker be given tasks; or, if it must get no further one, let it end."""
        if not worker.is_working():
            return
        if worker.must_retire(self._pool.options.max_tasks_per_worker):
            worker.retire()
        else:
            self._assigner.refill(worker)

    # The end

    def outdate(self) -> None:
        """Let the present workers be given no further task. Called from any thread."""
        self._settings_version += 1
        for worker in self.workers():
            worker.is_outdated = True

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

    def terminate(
        self,
        worker: WorkerProcess,
        reason: BaseException | None = None,
        task: ProcessTask | None = None,
    ) -> None:
        """Send a worker SIGTERM; `task`, which it runs, fails with `reason`."""
        # First, so that the worker cannot begin another task, which SIGTERM would hit.
        self._assigner.recall(worker)
        worker.terminate(reason, task)
        self._assigner.remove_idle(worker)

    def close(self) -> None:
        """Terminate all workers, and start no further one."""
        self.closing = True
        for worker in self.workers():
            self.terminate(worker)

    def remove(self, dead: WorkerProcess) -> str:
        """Forget a dead worker; return how it ended."""
        self._assigner.recall(dead)
        self._assigner.remove_idle(dead)
        self._workers.discard(dead)
        death = dead.bury()
        if dead.never_became_ready() and not dead.tasks:
            error = dead.start_error or f"{death} before it was ready."
            if self._starter.on_death(error, has_reported=dead.start_error is not None):
                self._give_up(error)
        return death
