"""
Run the dispatcher: the one thread that exchanges messages with all worker processes of a pool.

    enqueue(), any thread          the dispatcher's thread         a worker process
    ---------------------          -----------------------         ----------------
    queue.append(task)
    an idle worker? give() ----------------- RunTask ------------> reads the task
    none? wake() ----------------> starts a worker
                                   pool.begin(task)  <--Started--- runs the task
                                   task.report()     <--Sample----
                                   pool.finish(task) <--Result----
                                   sends it the next task
    cancel(), close() --post()---> terminates a worker --SIGTERM-> cancels its task
                                   fails or requeues  <-sentinel-- ends
                                   the worker's tasks

Each worker has its own socket, so a worker that dies, stops or leaves a frame unfinished affects no
other worker. The dispatcher never waits for a single worker: it reads and writes without blocking,
and sleeps until a socket, a sentinel, wake() or a deadline ends its select().

Invariant: a worker owns a task after its message Started for this task. If a worker dies before
that message, the dispatcher requeues the task, so the death of an idle worker loses no task.
"""

from __future__ import annotations

import selectors
from contextlib import ExitStack
from functools import partial
from multiprocessing import util as multiprocessing_util
from typing import TYPE_CHECKING
from weakref import WeakSet

from .. import shutdown
from ..clocks import Clocks
from ..exceptions import TaskCancelled
from ..forking import reset_in_child
from .assigning import Assigner
from .crew import Crew
from .loop import Loop
from .messages import MessageHandler
from .starting import Starter, forget_parents_children, make_launch

if TYPE_CHECKING:
    from ..conf import ProcessOptions
    from ..pools.base import Pool
    from .connection import WorkerConnection
    from .settings import DjangoSettings
    from .task import ProcessTask
    from .wire import WorkerMessage
    from .worker_process import WorkerProcess


class Dispatcher:
    """Gives the tasks of one pool to its workers. Public methods: called from any thread."""

    def __init__(self, pool: Pool[ProcessOptions, ProcessTask], settings: DjangoSettings) -> None:
        self._pool = pool
        self._options = pool.options
        self.starter = Starter(pool.alias, make_launch(pool.options), settings)
        # True if the thread may start a worker for the next task: then task_added() wakes it.
        self._wants_tasks = True
        # At exit multiprocessing calls its finalizers and then joins its children, so this
        # finalizer must end the workers: otherwise the join would never return.
        self._finalizer = multiprocessing_util.Finalize(
            None, shutdown.drain_at_exit, exitpriority=100
        )
        # True after an error has ended the thread: the pool must use another dispatcher.
        self.has_failed = False
        with ExitStack() as undo:
            undo.callback(self._finalizer.cancel)
            self._loop = Loop(
                f"django-tasks-{pool.alias}-dispatcher",
                on_turn=self._on_turn,
                is_done=lambda: self._crew.closing and not self._crew,
                on_end=self._on_end,
                write_log=pool.notifier.post_log,
                on_suspension=lambda seconds: self._crew.postpone(seconds),
            )
            undo.callback(self._loop.close)
            self._assigner = Assigner(pool, self._loop.wake, self.stop)
            self._crew = Crew(pool, self.starter, self._assigner, self._listen_to)
            self._messages = MessageHandler(pool, self._crew, self._assigner, self._loop.call)
            self._loop.start()
            undo.pop_all()
        _dispatchers.add(self)

    def task_added(self) -> None:
        """Give waiting tasks to idle workers, or have the dispatcher start workers for them."""
        self._assigner.assign()
        # Unlocked: the dispatcher sets the flag and then checks the queue again.
        if self._wants_tasks and self._pool.queue:
            self._wants_tasks = False
            self._loop.wake()

    def stop(self, task: ProcessTask) -> None:
        """Stop the worker that runs a cancelled task."""
        task.is_cancelled = True  # A thread that is sending the task reads this afterwards.
        self._loop.post(self._stop_task, task)

    def workers(self) -> list[WorkerProcess]:
        """Return all workers, also those that are ending."""
        return self._crew.workers()

    def replace_workers(self, settings: DjangoSettings) -> None:
        """Replace all workers by workers with these settings; running tasks may finish."""
        self.starter.settings = settings
        self._crew.outdate()
        self._loop.post(self._crew.retire_outdated)

    def waiting_in_workers(self) -> int:
        """Return the number of tasks that wait in workers behind a running task."""
        return sum(max(0, len(worker.tasks) - 1) for worker in self.workers())

    def close(self) -> None:
        """Terminate all workers; return when they and the dispatcher's thread have ended."""
        self._loop.post(self._crew.close)
        self._loop.join()

    def forget_parent(self) -> None:
        """Close the parent's sockets, pipes and selector. Called from: a child of fork()."""
        forget_parents_children(self.workers())
        self._loop.close()

    # Only the dispatcher's thread calls the methods below.

    def _on_end(self, error: BaseException | None) -> None:
        self._finalizer.cancel()
        if error is not None:
            # A thread that adds a task to the queue reads the flag afterwards: either the line
            # below fails the task, or that thread starts another dispatcher.
            self.has_failed = True
            self._crew.abandon(error, self._loop.call)

    def _on_turn(self) -> float | None:
        """Act on deadlines, assign tasks, start workers; return the time of the next deadline."""
        now = Clocks.monotonic()
        for worker in self.workers():
            if worker.has_expired(now):
                self._loop.call(self._on_deadline, worker)
        self._loop.call(self._assign)
        for worker in self.workers():
            connection = worker.connection
            if connection.has_unsent is not connection.is_watched_for_writing:
                self._watch_writing(connection)
        due_at = self._crew.next_deadline(now)
        retry_at = self.starter.retry_at
        # `now` is the time at which this turn began: `retry_at` may have passed after
        # start_missing() checked it, and then the next turn must start the worker.
        if self._pool.queue and retry_at > now:
            due_at = retry_at if due_at is None else min(due_at, retry_at)
        return due_at

    def _assign(self) -> None:
        """Give waiting tasks to idle workers, and start workers for the others."""
        try:
            self._assigner.assign()
            self._crew.start_missing()
            self._wants_tasks = True
            if self._pool.queue:
                # Tasks that another thread added before `_wants_tasks` became True have not woken
                # this thread, so assign them here.
                self._assigner.assign()
                self._crew.start_missing()
            self._assigner.share(self._crew.workers())
        finally:
            # Set the flag also after an exception: while it is False, no task wakes this thread.
            self._wants_tasks = self._crew.can_grow()

    def _stop_task(self, task: ProcessTask) -> None:
        error = TaskCancelled("The task was cancelled.")
        for worker in self.workers():
            if task not in worker.tasks:
                continue
            if not self._crew.stop_running(worker, task, error):
                break
            return
        self._pool.fail_waiting(task, error)

    def _on_deadline(self, worker: WorkerProcess) -> None:
        """Act on a deadline of a worker, or take back tasks that wait for too long."""
        # The worker may have sent a result before its deadline, while this process was suspended.
        self._messages.handle(worker, worker.connection.receive_rest())
        if worker not in self._crew or not worker.has_expired(Clocks.monotonic()):
            return
        if worker.has_ended():  # A process that the task has forked keeps the sentinel open.
            self._on_sentinel(worker, 0)
        else:
            self._crew.act_on_deadline(worker)

    def _listen_to(self, worker: WorkerProcess, undo: ExitStack) -> None:
        self._loop.watch(worker.connection.sock, partial(self._on_socket, worker))
        undo.callback(self._loop.unwatch, worker.connection.sock)
        self._loop.watch_end(worker.process.sentinel, partial(self._on_sentinel, worker))

    def _watch_writing(self, connection: WorkerConnection) -> None:
        """Watch for writing while bytes are unsent, to send them when the socket accepts more."""
        connection.is_watched_for_writing = connection.has_unsent
        self._loop.watch_writing(connection.sock, connection.is_watched_for_writing)

    def _on_socket(self, worker: WorkerProcess, events: int) -> None:
        if worker not in self._crew:
            return  # This turn has already removed the worker.
        if events & selectors.EVENT_WRITE:
            worker.connection.flush()
        if events & selectors.EVENT_READ:
            messages: list[WorkerMessage] | None
            try:
                messages = worker.connection.receive()
            except EOFError:
                messages = None
            # Outside of the `except` block, so that EOFError does not become the __context__ of an
            # error of the worker's tasks.
            if messages is None:
                self._on_end_of_socket(worker)
            else:
                self._messages.handle(worker, messages)

    # Methods that handle the end of a worker

    def _on_end_of_socket(self, worker: WorkerProcess) -> None:
        """Give no task to a worker that is ending, or whose running task has closed its socket."""
        self._loop.unwatch(worker.connection.sock)
        worker.note_end()
        self._assigner.remove_idle(worker)

    def _on_sentinel(self, worker: WorkerProcess, events: int) -> None:
        """Read the last messages of a dead worker, then record or requeue its tasks."""
        if worker in self._crew:
            worker.note_end()  # ENDING: the last Result must not make the worker idle.
            self._messages.handle(worker, worker.connection.receive_rest())
            self._loop.unwatch_end(worker.process.sentinel)
            self._bury(worker)

    def _bury(self, dead: WorkerProcess) -> None:
        self._loop.unwatch(dead.connection.sock)
        death = self._crew.remove(dead)
        for task in reversed(dead.tasks):
            self._loop.call(self._crew.resolve, task, dead, death)


_dispatchers: WeakSet[Dispatcher] = WeakSet()


@reset_in_child
def _forget_parent() -> None:
    for dispatcher in list(_dispatchers):
        dispatcher.forget_parent()
    _dispatchers.clear()
