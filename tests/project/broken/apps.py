"""See the package."""

from django.apps import AppConfig

from django_tasks_local.processes.child import in_worker_process


class BrokenConfig(AppConfig):
    """Fail to start in a worker process; start normally in the process that runs the tests."""

    name = "tests.project.broken"

    def ready(self) -> None:
        """Raise."""
        if in_worker_process():
            raise RuntimeError("this app has no luck today")
