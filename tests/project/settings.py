"""Django settings of the project with which the tests run."""

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
# MD5 is fast, and need not be safe: the passwords are in the source of the tests.
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

# The test database is a file, because each worker thread opens its own connection.
_DATABASE = Path(tempfile.gettempdir()) / f"django-tasks-local-{os.getpid()}.sqlite3"
DATABASES = {
    "default": {
        "ENGINE": "django.db.backends.sqlite3",
        "NAME": os.devnull,
        "OPTIONS": {"transaction_mode": "IMMEDIATE"},  # as docs/databases.md recommends
        "TEST": {"NAME": str(_DATABASE)},
    }
}

TASKS = {
    "default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"},
    "immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
    "dummy": {"BACKEND": "django.tasks.backends.dummy.DummyBackend"},
}

# A test sets TEST_SETTINGS to override settings, as JSON, in a process that it starts.
globals().update(json.loads(os.environ.get("TEST_SETTINGS", "{}")))
if globals().get("WITH_DAPHNE"):  # Daphne's `runserver` replaces Django's.
    INSTALLED_APPS.insert(0, "daphne")
if globals().get("WITH_APP"):  # The core is an optional app, too.
    INSTALLED_APPS.insert(0, "django_tasks_local")
