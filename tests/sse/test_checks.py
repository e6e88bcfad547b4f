"""Tests of the system checks of django_tasks_local_sse."""

import re
import sys
from typing import Any

import pytest
from django.apps import apps
from django.conf import settings
from django.core.checks import run_checks
from django.core.exceptions import ImproperlyConfigured
from django.test import Client, override_settings

from django_tasks_local_sse import bridge as bridge_module
from django_tasks_local_sse.access import events_url
from django_tasks_local_sse.conf import SSESettings, sse_settings
from tests.project import tasks
from tests.support.factories import anonymous_request
from tests.support.waiting import finished


def test_valid_settings_report_nothing() -> None:
    assert run_checks() == []


def test_default_settings() -> None:
    assert sse_settings() == SSESettings(
        token_max_age=86_400,
        expose_results=False,
        expose_errors=False,
        keepalive=15,
        retry=1,
        recheck_interval=15,
        wsgi_hold=0,
        max_streams=None,
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"KEEP_ALIVE": 3}, "unknown key 'KEEP_ALIVE'"),
        ({"RETRY": 0}, "['RETRY'] must be a number of seconds above 0"),
        ({"RECHECK_INTERVAL": -1}, "['RECHECK_INTERVAL'] must be a number of seconds above 0"),
        ({"MAX_STREAMS": 0}, "['MAX_STREAMS'] must be None or a whole number, 1 or more, not 0"),
        ({"MAX_STREAMS": 2.5}, "['MAX_STREAMS'] must be None or a whole number"),
        ({"KEEPALIVE": "15"}, "['KEEPALIVE'] must be a number of seconds above 0 and at most"),
        ({"KEEPALIVE": 0}, "['KEEPALIVE'] must be"),
        ({"TOKEN_MAX_AGE": -1}, "['TOKEN_MAX_AGE'] must be"),
        ({"WSGI_HOLD": float("inf")}, "['WSGI_HOLD'] must be"),
        ({"TOKEN_MAX_AGE": 10**15}, "['TOKEN_MAX_AGE'] must be"),
        ({"EXPOSE_RESULTS": "yes"}, "['EXPOSE_RESULTS'] must be True or False, not 'yes'"),
        (["RETRY"], "TASKS_SSE must be a dict"),
        (None, "TASKS_SSE must be a dict"),
    ],
)
def test_invalid_settings_are_reported(value: Any, message: str) -> None:
    with override_settings(TASKS_SSE=value):
        [problem] = run_checks()
        assert message in problem.msg
        assert problem.id.startswith("django_tasks_local_sse.E")
        with pytest.raises(ImproperlyConfigured, match=re.escape(message)):
            sse_settings()
        # No error is raised at the start, so that `manage.py check` can report all mistakes.
        apps.get_app_config("django_tasks_local_sse").ready()


def test_invalid_token_max_age_falls_back_to_laxer_default() -> None:
    """An invalid TOKEN_MAX_AGE stops streams instead of making links valid for a day."""
    result = finished(tasks.noop.enqueue())
    url = events_url(anonymous_request(), result)
    with (
        override_settings(TASKS_SSE={"TOKEN_MAX_AGE": "60"}),
        pytest.raises(ImproperlyConfigured, match="TOKEN_MAX_AGE"),
    ):
        Client().get(url)


@pytest.mark.parametrize("bridge", [False, True])
def test_missing_channel_manager(bridge: bool, caplog: pytest.LogCaptureFixture) -> None:
    with override_settings(
        EVENTSTREAM_CHANNELMANAGER_CLASS="nowhere.Manager", TASKS_SSE={"BRIDGE": bridge}
    ):
        [problem] = run_checks()
        assert problem.id == "django_tasks_local_sse.E005"
        assert "No module named 'nowhere'" in problem.msg
        # AppConfig.ready() calls install(), which must not raise, or `check` would not run.
        bridge_module.install()
        assert "is ignored" in caplog.text


def problems(**settings: Any) -> list[str]:
    with override_settings(**settings):
        return [f"{problem.id}: {problem.msg} {problem.hint}" for problem in run_checks()]


def without(app: str) -> list[str]:
    return [name for name in settings.INSTALLED_APPS if name != app]


def test_bridge_to_public_channels() -> None:
    [problem] = problems(TASKS_SSE={"BRIDGE": True})
    assert "E003" in problem
    assert "EVENTSTREAM_CHANNELMANAGER_CLASS" in problem
    assert not problems(
        TASKS_SSE={"BRIDGE": True},
        EVENTSTREAM_CHANNELMANAGER_CLASS="tests.project.channels.ChannelManager",
    )


def test_django_eventstream_missing_in_installed_apps() -> None:
    [problem] = problems(INSTALLED_APPS=without("django_eventstream"))
    assert "E004" in problem
    assert "Add 'django_eventstream' to INSTALLED_APPS" in problem


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"INSTALLED_APPS": without("django.contrib.staticfiles")}, "is not in INSTALLED_APPS"),
        ({"STATICFILES_FINDERS": []}, "no finder of STATICFILES_FINDERS finds"),
    ],
)
def test_static_files_without_finder(changed: dict[str, Any], reason: str) -> None:
    [problem] = problems(**changed)
    assert "W001" in problem
    assert reason in problem


def test_static_files_without_url() -> None:
    found = [problem for problem in problems(STATIC_URL=None) if "django_tasks_local" in problem]
    assert ["W001" in problem and "STATIC_URL" in problem for problem in found] == [True]


def test_django_eventstream_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of AppConfig.ready() names the extra that installs django-eventstream."""
    monkeypatch.setitem(sys.modules, "django_eventstream", None)
    with pytest.raises(ImproperlyConfigured, match=r"pip install .django-tasks-local\[sse\]"):
        apps.get_app_config("django_tasks_local_sse").ready()
