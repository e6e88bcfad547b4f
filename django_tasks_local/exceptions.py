"""This module defines the exceptions of this package and imports no other module of it."""

from django.tasks.exceptions import TaskException


class TaskCancelled(BaseException):
    """
    Raised in a task, and stored as its error, when the task is cancelled.

    It is a BaseException, like asyncio.CancelledError, so that a task's `except Exception` does not
    catch it. A task may catch TaskCancelled, clean up and raise it again.
    """


class TaskLost(Exception):  # noqa: N818 - named for the event, like TaskResultDoesNotExist
    """Stored as the error of a task that was unfinished when its process or its pool ended."""


class TaskTimeout(Exception):  # noqa: N818
    """Stored as the error of a task that was stopped after OPTIONS["TIMEOUT"] seconds."""


class WorkerDied(Exception):  # noqa: N818
    """Stored as the error of a task whose worker process died, or could not be started."""


class DatabaseChanged(Exception):  # noqa: N818
    """Stored as the error of a task of a test run that would have used another database."""


class QueueFull(TaskException):
    """Raised by enqueue() if MAX_PENDING + MAX_WORKERS tasks of the backend are unfinished."""


class ShuttingDown(TaskException, RuntimeError):  # noqa: N818
    """Raised by enqueue() when its backend, or the whole process, has begun to shut down."""
