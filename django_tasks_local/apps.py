"""The optional Django application. The task backends work without it."""

from django.apps import AppConfig

from . import signal_handlers


class TasksLocalConfig(AppConfig):
    """Local task backends: handle SIGTERM from the start of the process."""

    name = "django_tasks_local"
    verbose_name = "Local tasks"

    def ready(self) -> None:
        """
        Install the signal handlers in the thread of django.setup(), usually the main thread.

        Some servers, such as waitress, create the first backend in a thread, where Python cannot
        install signal handlers, and handle no SIGTERM themselves.
        """
        signal_handlers.install_signal_handlers()
