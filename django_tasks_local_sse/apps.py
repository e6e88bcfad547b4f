"""The AppConfig of django_tasks_local_sse."""

from importlib.util import find_spec

from django.apps import AppConfig
from django.core import checks
from django.core.exceptions import ImproperlyConfigured

# The import of `foreign` connects the receivers that publish events for tasks of other backends.
from django_tasks_local import foreign  # noqa: F401

from .checks import CHECKS
from .conf import find_mistakes, sse_settings


class TasksSSEConfig(AppConfig):
    """Configures the app that sends the progress of tasks to browsers as server-sent events."""

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
        # Invalid settings raise no error here, or `manage.py check` could not report all of them.
        # The first stream, or the first page with a link, raises ImproperlyConfigured.
        if not any(find_mistakes()) and sse_settings().bridge:
            # Imported only if needed, because `bridge` imports django-eventstream, which is slow.
            from . import bridge

            bridge.install()
