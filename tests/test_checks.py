"""System checks."""

from typing import Any

import pytest
from django.core.checks import run_checks
from django.test import override_settings

from django_tasks_local_sse.conf import SSESettings, sse_settings


def test_no_complaint_about_the_tests_settings() -> None:
    assert run_checks() == []


def test_defaults() -> None:
    assert sse_settings() == SSESettings(
        token_max_age=86_400,
        expose_results=False,
        expose_errors=False,
        keepalive=15,
        retry=1000,
        wsgi_hold=0,
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"KEEP_ALIVE": 3}, "unknown key 'KEEP_ALIVE'"),
        ({"RETRY": 0}, "['RETRY'] must be an integer above 0, not 0"),
        ({"RETRY": 1.5}, "['RETRY'] must be an integer"),
        ({"KEEPALIVE": "15"}, "['KEEPALIVE'] must be a number of seconds above 0, not '15'"),
        ({"KEEPALIVE": 0}, "['KEEPALIVE'] must be"),
        ({"TOKEN_MAX_AGE": -1}, "['TOKEN_MAX_AGE'] must be"),
        ({"WSGI_HOLD": float("inf")}, "['WSGI_HOLD'] must be"),
        ({"TOKEN_MAX_AGE": 10**15}, "['TOKEN_MAX_AGE'] must be"),
        ({"EXPOSE_RESULTS": "yes"}, "['EXPOSE_RESULTS'] must be True or False, not 'yes'"),
        (["RETRY"], "TASKS_SSE must be a dict"),
        (None, "TASKS_SSE must be a dict"),
    ],
)
def test_wrong_settings(value: Any, message: str) -> None:
    with override_settings(TASKS_SSE=value):
        [problem] = run_checks()
        assert message in problem.msg
        assert problem.id.startswith("django_tasks_local_sse.E")
        # What cannot be meant is not acted on: nothing is exposed by mistake.
        assert sse_settings() == SSESettings()


@override_settings(TASKS={"default": {"BACKEND": "django_tasks_local.ThreadPoolBackend",
                                      "OPTIONS": {"MAX_WORKER": 2}}})  # fmt: skip
def test_wrong_options_are_found_by_check() -> None:
    with pytest.raises(Exception, match="unknown key 'MAX_WORKER'"):
        run_checks()
