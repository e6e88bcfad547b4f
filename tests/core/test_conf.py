"""Defaults of OPTIONS that depend on the process."""

import sys

import pytest

from django_tasks_local.conf import ThreadOptions


@pytest.mark.parametrize(
    ("command", "seconds"),
    [
        (["/usr/bin/uvicorn", "project.asgi:application", "--reload"], 0),
        (["C:\\Scripts\\granian.exe".replace("\\", "/"), "--reload", "project.asgi"], 0),
        (["/usr/lib/python3/hypercorn/__main__.py", "--reload", "project.asgi"], 0),
        (["gunicorn", "--reload", "project.wsgi"], 0),
        (["gunicorn", "project.wsgi"], 5),
        (["manage.py", "command", "--reload"], 5),
        ([], 5),
    ],
)
def test_no_shutdown_timeout_under_a_reloader(
    command: list[str], seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A development server that restarts after a change of the code does not wait for tasks."""
    monkeypatch.delenv("RUN_MAIN", raising=False)
    monkeypatch.setattr(sys, "argv", command)
    assert ThreadOptions.from_params("default", {}).shutdown_timeout == seconds


def test_no_shutdown_timeout_under_djangos_reloader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUN_MAIN", "true")
    assert ThreadOptions.from_params("default", {}).shutdown_timeout == 0
