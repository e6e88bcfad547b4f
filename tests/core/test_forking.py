"""forking.reset_in_child() registers functions that each child of fork() calls."""

import os
import subprocess
import sys

import pytest

from django_tasks_local import forking
from tests.support.paths import ROOT
from tests.support.systems import needs_fork


@pytest.fixture
def resets(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Replace the list of registered functions with an empty list, and return the new list."""
    registered: list[object] = []
    monkeypatch.setattr(forking, "_resets", registered)
    return registered


def test_the_order_is_that_of_registration(resets: list[object]) -> None:
    called: list[str] = []

    @forking.reset_in_child
    def first() -> None:
        called.append("first")

    forking.reset_in_child(lambda: called.append("second"))
    forking._reset_all()
    assert called == ["first", "second"]
    assert resets[0] is first


@pytest.mark.parametrize("error", [RuntimeError, SystemExit])
def test_a_function_that_raises_stops_no_other(
    resets: list[object], error: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    called: list[str] = []

    @forking.reset_in_child
    def fail() -> None:
        raise error("no")

    forking.reset_in_child(lambda: called.append("the next"))
    forking._reset_all()
    assert called == ["the next"]
    assert "fail at 0x" in caplog.text
    assert "failed in the child of a fork()" in caplog.text


@needs_fork
def test_it_runs_in_the_child_only() -> None:
    code = """
import os
from django_tasks_local.forking import reset_in_child
called = []
reset_in_child(lambda: called.append(os.getpid()))
pid = os.fork()
if pid == 0:
    os._exit(0 if called == [os.getpid()] else 3)
assert called == []
assert os.waitpid(pid, 0)[1] == 0
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=60)


@needs_fork
def test_a_system_without_fork() -> None:
    """
    Without os.register_at_fork(), as on Windows, the modules import and reset_in_child() has no
    effect.
    """
    code = """
import os
import django.tasks  # asyncio needs the function below.
del os.register_at_fork
from django_tasks_local import forking
from tests.support.paths import ROOT
forking.reset_in_child(int)
from django_tasks_local import signal_handlers
"""
    assert hasattr(os, "register_at_fork")
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=60)
