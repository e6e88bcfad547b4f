"""See the package."""

from django.apps import AppConfig

from django_tasks_local import worker


class BrokenConfig(AppConfig):
    """Raises in ready(), but not in the process that runs the tests."""

    name = "tests.project.broken"

    def ready(self) -> None:
        """Raise."""
        if worker.is_worker:
            raise RuntimeError("this app has no luck today")
