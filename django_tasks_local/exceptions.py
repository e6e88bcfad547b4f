"""The exceptions that end a task besides its own errors. Imports nothing of this package."""

from django.tasks.exceptions import TaskException


class TaskCancelled(BaseException):
    """
    The task was cancelled.

    A BaseException, like asyncio.CancelledError, so that a task's `except Exception` does not
    swallow it. A task may catch it, clean up and raise it again.
    """


class TaskLost(Exception):  # noqa: N818 - named for the event, like TaskResultDoesNotExist
    """The process ended before the task finished."""


class TaskTimeout(Exception):  # noqa: N818
    """The task ran for longer than OPTIONS["TIMEOUT"] and was stopped."""


class WorkerDied(Exception):  # noqa: N818
    """The worker process died while it ran the task."""


class QueueFull(TaskException):
    """OPTIONS["MAX_PENDING"] tasks are waiting already, so the task was not enqueued."""
