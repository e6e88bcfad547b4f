"""A small project that the tests serve in processes of its own."""

import os

SECRET_KEY = "only for tests"
ALLOWED_HOSTS = ["*"]
USE_TZ = True
ROOT_URLCONF = "tests.process_project.urls"
WSGI_APPLICATION = "tests.process_project.wsgi.application"
ASGI_APPLICATION = "tests.process_project.asgi.application"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "tests.process_project",
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ.get("PROCESS_DATABASE", os.devnull),
    }
}
TASKS = {
    "default": {
        "BACKEND": "django_tasks_local.ProcessPoolBackend",
        "OPTIONS": {"MAX_WORKERS": 1, "SHUTDOWN_TIMEOUT": 1},
    }
}
