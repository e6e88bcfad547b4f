"""Test runs of `manage.py test` with PostgreSQL, whose tests run tasks."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.backends import PROCESSES, THREADS
from tests.support.postgres import Postgres
from tests.support.site import Site

KEPT = {"CONN_MAX_AGE": 60}
POOLED = {"OPTIONS": {"pool": {"min_size": 1, "max_size": 2}}}

TESTS = """
from django.test import TransactionTestCase

from django_tasks_local.testing import wait_until_idle
from site_app.models import Note
from site_app.tasks import evaluate, write_note, write_note_async

class FirstTests(TransactionTestCase):
    def test_tasks_write(self):
        results = [write_note.enqueue("sync"), write_note_async.enqueue("async", "", "")]
        wait_until_idle(timeout=60)
        for result in results:
            result.refresh()
            assert not result.errors, result.errors[0].traceback
        self.assertEqual(Note.objects.count(), 2)

class SecondTests(FirstTests):
    pass
"""


def run_tests(postgres: Postgres, site: Site, *args: str) -> None:
    """Run the site's tests; fail if a test fails, or if a test database cannot be dropped."""
    done = site.python(
        *("-m", "django", "test", "--noinput", *args), DJANGO_SETTINGS_MODULE="site_settings"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ran 2 tests" in done.stderr, done.stderr
    with postgres.connect() as connection:
        names = connection.execute("SELECT datname FROM pg_database WHERE datname LIKE 'test_%'")
        assert names.fetchall() == []


@pytest.mark.parametrize(
    ("backend", "database"),
    [(THREADS, KEPT), (PROCESSES, KEPT), (THREADS, POOLED), (PROCESSES, POOLED)],
    ids=["threads-kept", "processes-kept", "threads-pooled", "processes-pooled"],
)
def test_test_database_is_accessed_by_other_users(
    postgres: Postgres, tmp_path: Path, backend: str, database: dict[str, Any]
) -> None:
    """
    PostgreSQL drops a test database only if no session uses it, also one of an idle worker.

    With --parallel each process of the test runner is daemonic, and has workers of its own.
    """
    settings = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": "site",
        "USER": postgres.user,
        "HOST": postgres.host,
        **database,
    }
    site = Site(
        tmp_path,
        f'DATABASES["default"] = {settings!r}\nTASKS["default"]["BACKEND"] = {backend!r}\n',
    )
    site.write("site_app/tests.py", TESTS)
    run_tests(postgres, site)
    run_tests(postgres, site, "--parallel", "2")
