"""
The settings of run.py and of its worker processes.

Django's tests replace TASKS, but a worker process needs every alias that these tests use, so TASKS
defines all of them. The test database is a file, because a worker process cannot use a database in
memory.
"""

import os

KIND = os.environ["DJANGO_SUITE_BACKEND"]  # "ThreadPoolBackend" or "ProcessPoolBackend"

SECRET_KEY = "only for tests"
USE_TZ = False  # Django's own test settings have the same value.
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
