"""What can happen to a task besides its own errors. Imports nothing of this package."""

from django.tasks.exceptions import TaskException


class TaskCancelled(BaseException):
    """
    The task was cancelled.

    A BaseException, as asyncio.CancelledError is, so that a task's `except Exception` does not
    swallow it. A task may catch it, tidy up and raise it again.
    """


class TaskLost(Exception):  # noqa: N818 - named for what happened, as TaskResultDoesNotExist is
    """The process ended before the task did."""


class TaskTimeout(Exception):  # noqa: N818
    """The task ran for longer than OPTIONS["TIMEOUT"] and was stopped."""


class WorkerDied(Exception):  # noqa: N818
    """The worker process died while it ran the task."""


class QueueFull(TaskException):
    """OPTIONS["MAX_PENDING"] tasks are waiting already; nothing was enqueued."""
