"""
The settings of run.py and of its worker processes.

Django's tests replace TASKS; a worker process needs the aliases that they use. The test database is
a file, because a worker process cannot use one in memory.
"""

import os

KIND = os.environ["DJANGO_SUITE_BACKEND"]  # "ThreadPoolBackend" or "ProcessPoolBackend"

SECRET_KEY = "only for tests"
USE_TZ = False  # as in Django's own test settings
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "TEST": {"NAME": os.environ["DJANGO_SUITE_DATABASE"]},
    }
}
TASKS = {
    alias: {"BACKEND": f"django_tasks_local.{KIND}", "QUEUES": []}
    for alias in ("default", "immediate")
}
