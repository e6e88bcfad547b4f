"""The Django application."""

from importlib.util import find_spec

from django.apps import AppConfig
from django.core import checks
from django.core.exceptions import ImproperlyConfigured

# Imported for its side effect: it connects the receivers that publish tasks of other backends.
from django_tasks_local import foreign  # noqa: F401

from .checks import CHECKS
from .conf import sse_settings


class TasksSSEConfig(AppConfig):
    """Live progress of tasks, over server-sent events."""

    name = "django_tasks_local_sse"
    verbose_name = "Live task progress"

    def ready(self) -> None:
        """
        Register the system checks and, if TASKS_SSE enables it, pass events to django-eventstream.

        Runs once, in the thread of django.setup(). Raises ImproperlyConfigured if the package
        django-eventstream is not installed, because the views of this package import it.
        """
        if find_spec("django_eventstream") is None:
            raise ImproperlyConfigured(
                "django_tasks_local_sse in INSTALLED_APPS needs django-eventstream: "
                'pip install "django-tasks-local[sse]".'
            )
        for check in CHECKS:
            checks.register(check)
        if sse_settings().bridge:
            from . import bridge  # here, because importing django-eventstream is slow

            bridge.install()
