"""The Django settings of stress/storm.py."""

from typing import Any

USE_TZ = True

FEW_RESULTS = 50  # The option MAX_RESULTS of the backend `evicting`.
# With few waiting tasks a task starts soon, so that cancel() is also called for running tasks.
MAX_PENDING = 1000
KEEP_ALL = {"MAX_PENDING": MAX_PENDING, "MAX_RESULTS": 10_000_000}
TASKS: dict[str, dict[str, Any]] = {
    "default": {
        "BACKEND": "django_tasks_local.ThreadPoolBackend",
        "OPTIONS": {**KEEP_ALL, "MAX_WORKERS": 8},
    },
    "evicting": {
        "BACKEND": "django_tasks_local.ThreadPoolBackend",
        "OPTIONS": {**KEEP_ALL, "MAX_WORKERS": 4, "MAX_RESULTS": FEW_RESULTS},
    },
    "processes": {
        "BACKEND": "django_tasks_local.ProcessPoolBackend",
        "OPTIONS": {**KEEP_ALL, "MAX_WORKERS": 2},
    },
}
