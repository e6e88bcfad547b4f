"""Settings of the project that the tests serve."""

import json
import os
import tempfile
from pathlib import Path

SECRET_KEY = "only for tests"
ALLOWED_HOSTS = ["*"]
ROOT_URLCONF = "tests.project.urls"
ASGI_APPLICATION = "tests.project.asgi.application"
WSGI_APPLICATION = "tests.project.wsgi.application"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
STATIC_URL = "/static/"
SESSION_ENGINE = "django.contrib.sessions.backends.signed_cookies"
# Fast, and good enough for passwords that stand in the tests.
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]

INSTALLED_APPS = [
    "django.contrib.auth",
    "django.contrib.contenttypes",
    "django.contrib.staticfiles",
    "django_eventstream",
    "django_tasks_local_sse",
    "tests.project",
]
MIDDLEWARE = [
    "django.middleware.security.SecurityMiddleware",
    "django.middleware.csp.ContentSecurityPolicyMiddleware",
    "django.middleware.gzip.GZipMiddleware",
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.middleware.common.CommonMiddleware",
    "django.middleware.http.ConditionalGetMiddleware",
    "django.middleware.csrf.CsrfViewMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
]
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "APP_DIRS": True,
        "OPTIONS": {
            "context_processors": [
                "django.template.context_processors.request",
                "django.template.context_processors.csp",
                "django.contrib.auth.context_processors.auth",
            ]
        },
    }
]

# In a file, because a worker thread has a connection of its own.
_DATABASE = Path(tempfile.gettempdir()) / f"django-tasks-local-{os.getpid()}.sqlite3"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.devnull,
        "TEST": {"NAME": str(_DATABASE)},
    }
}

TASKS = {
    "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
    "immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
    "dummy": {"BACKEND": "django.tasks.backends.dummy.DummyBackend"},
}

# What a test wants otherwise of a server that it starts in a process of its own.
globals().update(json.loads(os.environ.get("TEST_SETTINGS", "{}")))
if globals().get("WITH_DAPHNE"):  # whose `runserver` takes the place of Django's own
    INSTALLED_APPS.insert(0, "daphne")
