"""The Django application."""

from django.apps import AppConfig
from django.core import checks

# Imported for what it does: the hub hears the tasks of every backend from now on.
from django_tasks_local import lifecycle  # noqa: F401

from .conf import check_settings


class TasksSSEConfig(AppConfig):
    """Live progress of tasks, over server-sent events."""

    name = "django_tasks_local_sse"
    verbose_name = "Live task progress"

    def ready(self) -> None:
        """Register the checks. Runs once, in the thread of django.setup()."""
        checks.register(check_settings)
