"""The configuration of an application that fails to start in worker processes."""

from django.apps import AppConfig

from django_tasks_local import in_worker_process


class BrokenConfig(AppConfig):
    """
    An application that fails in a worker process, but starts in the process that runs the tests.
    """

    name = "tests.project.broken"

    def ready(self) -> None:
        """Raise RuntimeError if this process is a worker process."""
        if in_worker_process():
            raise RuntimeError("this app has no luck today")
