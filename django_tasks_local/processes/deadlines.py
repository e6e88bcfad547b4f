"""Act on a worker process that stays in one state for too long."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..logs import get_logger
from ..time_limit import timeout_error
from .worker_process import IMPORT_WARNING_SECONDS
from .worker_state import START_SECONDS, START_WARNING_SECONDS, State

if TYPE_CHECKING:
    from .task import ProcessTask
    from .worker_process import WorkerProcess

logger = get_logger(__name__)


def act_on_deadline(worker: WorkerProcess, timeout: float | None) -> None:
    """
    End a worker whose deadline has passed, or log a warning.

    Called from: the dispatcher, after it has read all messages of the worker, and after recall(),
    so that at most the last task of the worker can be running.
    """
    task = worker.first_task
    if worker.state is State.STARTING:
        _act_on_slow_start(worker)
    elif worker.state is not State.BUSY or task is None:
        _act_on_slow_end(worker)
    elif len(worker.tasks) > 1:
        # The worker has begun the next task, so the first one has ended. The worker sends the
        # Result of the first one together with the Started of the next one.
        worker.limit(None)
    elif not task.has_started:
        _act_on_missing_start(worker, task)
    else:
        assert timeout is not None
        worker.terminate(timeout_error(timeout), task)


def _act_on_slow_start(worker: WorkerProcess) -> None:
    if not worker.has_warned:
        worker.has_warned = True
        logger.warning(
            "The worker process %s is not ready after %d seconds. It imports the settings and sets "
            "up Django.",
            worker.worker_id,
            START_WARNING_SECONDS,
        )
        worker.limit(START_SECONDS - START_WARNING_SECONDS)
        return
    worker.start_error = f"{worker.worker_id} was not ready after {START_SECONDS:.0f} seconds."
    worker.kill()


def _act_on_slow_end(worker: WorkerProcess) -> None:
    if worker.terminated:
        worker.kill()
    else:
        worker.terminate()


def _act_on_missing_start(worker: WorkerProcess, task: ProcessTask) -> None:
    if worker.is_importing:
        logger.warning(
            "The worker process %s has been importing the module of task id=%s path=%s for %d "
            "seconds.",
            worker.worker_id,
            task.id,
            task.path,
            IMPORT_WARNING_SECONDS,
        )
        worker.limit(None)  # An import has no time limit.
        return
    # A stopped process, or a thread that an earlier task has left and that holds the GIL. SIGKILL,
    # because the worker could still begin the task after SIGTERM. The dispatcher requeues the task
    # when the process has ended.
    logger.warning(
        "The worker process %s does not read task id=%s path=%s; it is killed, and another worker "
        "gets the task.",
        worker.worker_id,
        task.id,
        task.path,
    )
    worker.kill()
