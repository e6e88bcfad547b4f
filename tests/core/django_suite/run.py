"""
Run Django's tests of django.tasks against one backend; print the outcomes as one line of JSON.

    python -m tests.core.django_suite.run FOLDER [EXCLUDED ...]

FOLDER contains Django's package `tasks`. EXCLUDED names a test as `TestCase.method`. The backend
and the database come from environment variables that settings.py reads.
"""

import importlib
import json
import sys
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import django
from django.conf import settings

if not settings.configured:
    # The process that starts this script sets DJANGO_SETTINGS_MODULE.
    django.setup()

from django.test import SimpleTestCase, override_settings
from django.test.runner import DiscoverRunner

from tests.core.django_suite.adapters import Backend, FinishingBackend, Gate, HeldBackend

# Maps the name of a backend of Django to the adapter that takes its place.
ADAPTERS = {"ImmediateBackend": FinishingBackend, "DummyBackend": HeldBackend}


class RedirectedSettings(override_settings):
    """override_settings() that replaces Django's backends in TASKS with the adapters."""

    def __init__(self, **settings: Any) -> None:
        if "TASKS" in settings:
            settings["TASKS"] = {
                alias: {**backend, "BACKEND": _redirected(backend["BACKEND"])}
                for alias, backend in settings["TASKS"].items()
            }
        super().__init__(**settings)


def _redirected(path: str) -> str:
    adapter = ADAPTERS.get(path.rpartition(".")[2])
    return path if adapter is None else f"{adapter.__module__}.{adapter.__qualname__}"


class HeldMixin:
    """Close a Gate during each test, because the tasks that the test enqueues must not start."""

    def setUp(self) -> None:
        super().setUp()  # type: ignore[misc]
        gate = Gate()
        self.addCleanup(gate.open)  # type: ignore[attr-defined]


def load_cases(folder: str) -> list[type[unittest.TestCase]]:
    """Import Django's test modules and return subclasses of their test cases."""
    sys.path.insert(0, folder)  # Worker processes receive sys.path.
    return [
        type(case.__name__, (HeldMixin, case) if needs_gate(case) else (case,), {})
        for path in sorted(Path(folder).glob("tasks/test_*.py"))
        for case in cases_of(f"tasks.{path.stem}")
    ]


def cases_of(module_name: str) -> list[type[unittest.TestCase]]:
    """Import a test module of Django with the adapters in place of Django's backends."""
    with (
        # Django's test module imports these names, so they must be replaced before its import.
        mock.patch("django.test.override_settings", RedirectedSettings),
        mock.patch("django.tasks.backends.base.BaseTaskBackend", Backend),
    ):
        module = importlib.import_module(module_name)
    for name, adapter in ADAPTERS.items():
        if hasattr(module, name):
            setattr(module, name, adapter)
    classes = [value for value in vars(module).values() if isinstance(value, type)]
    return [
        value
        for value in classes
        if issubclass(value, unittest.TestCase) and value.__module__ == module_name
    ]


def needs_gate(case: type[unittest.TestCase]) -> bool:
    """Return whether the tests of this case run with HeldBackend as the default backend."""
    assert issubclass(case, SimpleTestCase)
    tasks = (case._overridden_settings or {}).get("TASKS", {})
    path: str = tasks.get("default", {}).get("BACKEND", "")
    return path.endswith(f".{HeldBackend.__qualname__}")


def main() -> None:
    """Run Django's tests except those that argv excludes; print the outcome as JSON."""
    folder, *excluded = sys.argv[1:]
    loader = unittest.TestLoader()
    tests = {
        f"{case.__name__}.{name}": case(name)
        for case in load_cases(folder)
        for name in loader.getTestCaseNames(case)
    }
    suite = unittest.TestSuite(test for name, test in tests.items() if name not in excluded)
    runner = DiscoverRunner(verbosity=0)
    runner.setup_test_environment()
    databases = runner.setup_databases()
    result = unittest.TextTestRunner(sys.stderr, verbosity=0).run(suite)
    runner.teardown_databases(databases)
    problems = (*result.failures, *result.errors, *result.skipped)
    outcome = {
        "found": sorted(tests),
        "run": result.testsRun,
        "problems": [f"{test}\n{text}" for test, text in problems],
    }
    sys.stdout.write(f"{json.dumps(outcome)}\n")


if __name__ == "__main__":
    main()
