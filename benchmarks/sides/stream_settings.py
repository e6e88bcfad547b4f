"""The Django settings of benchmarks/streams.py, with Django's usual middleware and SQLite."""

import os

SECRET_KEY = "only for this benchmark"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "benchmarks.sides.stream_project"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.sessions",
    "django_eventstream",
    "django_tasks_local_sse",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.environ["STREAMS_DATABASE"],
    }
}
TASKS = {"default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"}}
