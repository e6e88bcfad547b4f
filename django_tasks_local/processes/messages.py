"""Act on the messages that the worker processes of a pool send."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ..time_limit import timeout_error
from .wire import (
    Acknowledged,
    Broken,
    Ready,
    Result,
    Sample,
    Started,
    TimedOut,
    Unreadable,
    to_datetime,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from ..conf import ProcessOptions
    from ..pools.base import Pool
    from .assigning import Assigner
    from .crew import Crew
    from .task import ProcessTask
    from .wire import WorkerMessage
    from .worker_process import WorkerProcess


class MessageHandler:
    """Records what the workers of one pool report. Called from: the dispatcher's thread."""

    def __init__(
        self,
        pool: Pool[ProcessOptions, ProcessTask],
        crew: Crew,
        assigner: Assigner,
        call: Callable[..., bool],
    ) -> None:
        self._pool = pool
        self._crew = crew
        self._assigner = assigner
        self._call = call  # It returns False, and raises nothing, if a function raises an error.

    def handle(self, worker: WorkerProcess, messages: Iterable[WorkerMessage]) -> None:
        """Act on messages in their order; terminate a worker whose message raises an error."""
        for message in messages:
            if not self._call(self._handlers[type(message)], self, worker, message):
                self._call(self._reject, worker, message)

    def _on_ready(self, worker: WorkerProcess, message: Ready) -> None:
        self._crew.on_ready(worker)

    def _on_broken(self, worker: WorkerProcess, message: Broken) -> None:
        worker.start_error = message.error

    def _on_acknowledged(self, worker: WorkerProcess, message: Acknowledged) -> None:
        task = worker.first_task
        if task is None or task.id != message.result_id or task.has_started:
            self._reject(worker, message)
        else:
            worker.acknowledge_first()

    def _on_timed_out(self, worker: WorkerProcess, message: TimedOut) -> None:
        task, timeout = worker.first_task, self._pool.options.timeout
        # The worker may have sent this message after the task's Result.
        if task is not None and task.id == message.result_id and timeout is not None:
            self._crew.stop_running(worker, task, timeout_error(timeout))

    def _on_started(self, worker: WorkerProcess, message: Started) -> None:
        task = worker.first_task
        if task is None or task.id != message.result_id:
            self._reject(worker, message)
            return
        worker.start_first(self._pool.options.timeout)
        self._pool.begin(task, worker.worker_id, to_datetime(message.started_at))

    def _on_sample(self, worker: WorkerProcess, message: Sample) -> None:
        task = worker.first_task
        # Another thread of the worker may send a sample after its task's result.
        if task is not None and task.id == message.result_id:
            task.report(message.number, message.progress)

    def _on_result(self, worker: WorkerProcess, message: Result) -> None:
        task = worker.first_task
        if task is None or task.id != message.result_id or not task.has_started:
            self._reject(worker, message)
        elif worker.overrules(message):
            # terminate() has set the reason for which the task fails. The dispatcher records the
            # outcome when the worker is dead.
            number, progress = message.last
            if progress is not None:
                task.report(number, progress)
        else:
            if message.seconds:  # 0: the worker did not call the task's function.
                self._assigner.pace.note(task, message.seconds)
            worker.end_first()
            try:
                # The next task begins while the outcome of this one is recorded.
                self._crew.offer(worker)
            finally:
                self._pool.finish(task, message.outcome(), message.last)

    def _reject(self, worker: WorkerProcess, message: WorkerMessage) -> None:
        """Terminate a worker that has sent a wrong message; the task that it runs fails."""
        error: Exception = ValueError(f"A worker process has sent an unexpected message: {message}")
        if isinstance(message, Unreadable):
            error = message.error
        task = worker.first_task
        self._crew.terminate(worker, None if task is None or not task.has_started else error, task)

    _handlers: ClassVar[dict[type[WorkerMessage], Callable[..., None]]] = {
        Ready: _on_ready,
        Acknowledged: _on_acknowledged,
        TimedOut: _on_timed_out,
        Broken: _on_broken,
        Started: _on_started,
        Sample: _on_sample,
        Result: _on_result,
        Unreadable: _reject,
    }
