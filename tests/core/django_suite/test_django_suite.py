"""Django's own tests of django.tasks pass with both backends, except those in EXCLUDED."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import django
import pytest

from tests.core.django_suite.download import download_suite
from tests.support.paths import ROOT

UNKNOWN_OPTION = "the test's option `prefix` is unknown here, so the backend is not created"
NO_PRIORITY = "supports_priority is False, so using(priority=…) raises InvalidTask"
NO_DEFER = "supports_defer is False, so using(run_after=…) raises InvalidTask"
GETS_RESULTS = "supports_get_result is True"
COPIES = "the test changes DummyBackend's stored result; get_result() returns copies here"

# Maps the name of each test that cannot pass to the reason.
EXCLUDED = {
    "CustomBackendTestCase.test_using_correct_backend": UNKNOWN_OPTION,
    "CustomBackendTestCase.test_enqueue_async_task_on_non_async_backend": UNKNOWN_OPTION,
    "CustomBackendTestCase.test_backend_does_not_support_priority": UNKNOWN_OPTION,
    "CustomBackendTestCase.test_options": UNKNOWN_OPTION,
    "CustomBackendTestCase.test_no_enqueue": "a subclass of a local backend inherits enqueue()",
    "DummyBackendTestCase.test_clear": "only DummyBackend has clear(), which drops its results",
    "DummyBackendTestCase.test_refresh_result": COPIES,
    "DummyBackendTestCase.test_refresh_result_async": COPIES,
    "ImmediateBackendTestCase.test_cannot_get_result": GETS_RESULTS,
    "ImmediateBackendTestCase.test_cannot_refresh_result": GETS_RESULTS,
    "ImmediateBackendTestCase.test_throws_keyboard_interrupt": (
        "a KeyboardInterrupt in a worker cannot reach the caller of enqueue(); the task is FAILED"
    ),
    "TaskTestCase.test_chained_using": NO_DEFER,
    "TaskTestCase.test_invalid_priority": NO_PRIORITY,
    "TaskTestCase.test_naive_datetime": NO_DEFER,
    "TaskTestCase.test_using_priority": NO_PRIORITY,
    "TaskTestCase.test_using_run_after": NO_DEFER,
}
AT_LEAST = 60  # tests that are not excluded; Django 6.0 has fewer than 6.1


@pytest.mark.timeout(300)
@pytest.mark.parametrize("backend", ["ThreadPoolBackend", "ProcessPoolBackend"])
def test_the_tests_of_django_pass(backend: str, tmp_path: Path) -> None:
    folder = download_suite(django.get_version())
    outcome = run_suite(backend, folder, tmp_path / "db.sqlite3")
    assert outcome["problems"] == [], "\n".join(outcome["problems"])
    assert sorted(set(EXCLUDED) - set(outcome["found"])) == [], "excluded tests do not exist"
    assert outcome["run"] == len(outcome["found"]) - len(EXCLUDED) >= AT_LEAST


def run_suite(backend: str, folder: Path, database: Path) -> dict[str, Any]:
    """
    Run run.py in a new process, because Django's tests need other settings; return its outcome.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.core.django_suite.run", str(folder), *EXCLUDED],
        cwd=ROOT,
        env={
            **os.environ,
            "DJANGO_SETTINGS_MODULE": "tests.core.django_suite.settings",
            "DJANGO_SUITE_BACKEND": backend,
            "DJANGO_SUITE_DATABASE": str(database),
        },
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outcome: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcome
