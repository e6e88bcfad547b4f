"""settings_with() overrides TASKS with each kind of backend."""

from typing import Any

from django.test import override_settings

THREADS = "django_tasks_local.ThreadPoolBackend"
PROCESSES = "django_tasks_local.ProcessPoolBackend"


def settings_with(**options: Any) -> Any:
    """
    Return an override of TASKS: thread backends "default" and "threads", "processes", "immediate".

    The thread and process backends have these OPTIONS.
    """
    return override_settings(
        TASKS={
            "default": {"BACKEND": THREADS, "OPTIONS": options},
            "threads": {"BACKEND": THREADS, "OPTIONS": options},
            "processes": {"BACKEND": PROCESSES, "OPTIONS": {"MAX_WORKERS": 2} | options},
            "immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
        }
    )
