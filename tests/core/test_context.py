"""Tests of OPTIONS["CONTEXT"], which carries values from enqueue() into the task."""

import contextvars
from collections.abc import Callable
from datetime import date
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.tasks import TaskResultStatus
from django.utils import translation

from tests.project import context
from tests.support.backends import settings_with
from tests.support.waiting import finished

PATHS = [
    "tests.project.context.request_id",
    "tests.project.context.Tenant",
    "django_tasks_local.context.Language",
]


def in_new_context(function: Callable[[], None]) -> None:
    """Call a function whose changes of context variables end with it."""
    contextvars.copy_context().run(function)


@pytest.mark.parametrize("task", [context.read_context, context.read_context_async])
def test_values_are_carried_into_the_task(alias: str, task: Any) -> None:
    """A task sees a ContextVar, the value of a class and the language; the next task does not."""

    def enqueue() -> None:
        context.request_id.set({"id": 7})
        context.tenant.set("acme")
        with translation.override("de"):
            results.append(task.using(backend=alias).enqueue())

    results: list[Any] = []
    with settings_with(CONTEXT=PATHS, MAX_WORKERS=1):
        in_new_context(enqueue)
        results.append(task.using(backend=alias).enqueue())
        values = [finished(result).return_value for result in results]
    assert values == [[{"id": 7}, "acme", "de"], ["none", None, "en-us"]]


def test_exception_in_capture_propagates_from_enqueue(alias: str) -> None:
    def enqueue() -> None:
        context.tenant.set("unknown")
        with pytest.raises(LookupError, match="no such tenant"):
            context.read_context.using(backend=alias).enqueue()

    with settings_with(CONTEXT=PATHS):
        in_new_context(enqueue)


def test_exception_in_restore_fails_the_task(alias: str) -> None:
    def enqueue() -> None:
        context.tenant.set("deleted")
        result = finished(context.read_context.using(backend=alias).enqueue())
        assert result.status == TaskResultStatus.FAILED
        assert "the tenant was deleted" in result.errors[0].traceback

    with settings_with(CONTEXT=PATHS):
        in_new_context(enqueue)


def test_value_that_is_not_json_is_refused(alias: str) -> None:
    """The error names the variable and the type of its value."""

    def enqueue() -> None:
        context.request_id.set(date(2030, 1, 1))
        with pytest.raises(ValueError, match=r"context\.request_id .*type date"):
            context.read_context.using(backend=alias).enqueue()

    with settings_with(CONTEXT=PATHS):
        in_new_context(enqueue)


@pytest.mark.parametrize(
    "path", ["tests.project.context.missing", "tests.project.context.NotACarrier"]
)
def test_wrong_path_is_refused(path: str) -> None:
    with settings_with(CONTEXT=[path]), pytest.raises(ImproperlyConfigured, match=path):
        context.read_context.enqueue()


@pytest.mark.parametrize(
    "options", [{"CONTEXT": "tests.project.context.request_id"}, {"CONTEXT": [1]}]
)
def test_wrong_option_is_refused(options: dict[str, Any]) -> None:
    with settings_with(**options), pytest.raises(ImproperlyConfigured, match="dotted paths"):
        context.read_context.enqueue()
