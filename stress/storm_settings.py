"""The settings of stress/storm.py."""

from typing import Any

USE_TZ = True

FEW_RESULTS = 50  # MAX_RESULTS of the backend that evicts
# Bounds the time that a task waits, so that cancellations also hit running tasks.
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
