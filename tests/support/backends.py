"""Settings with each kind of backend."""

from typing import Any

from django.test import override_settings

THREADS = "django_tasks_local.ThreadPoolBackend"
PROCESSES = "django_tasks_local.ProcessPoolBackend"


def settings_with(**options: Any) -> Any:
    """Return settings with both kinds of backends with these OPTIONS; threads are the default."""
    return override_settings(
        TASKS={
            "default": {"BACKEND": THREADS, "OPTIONS": options},
            "threads": {"BACKEND": THREADS, "OPTIONS": options},
            "processes": {"BACKEND": PROCESSES, "OPTIONS": {"MAX_WORKERS": 2} | options},
            "immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
        }
    )
