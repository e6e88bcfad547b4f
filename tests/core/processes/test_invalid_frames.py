"""A worker process that sends an invalid frame is ended, and no other worker is affected."""

import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from django.test import override_settings

from django_tasks_local.processes.frames import HEADER, frame
from django_tasks_local.processes.loading import load_task
from tests.project import odd, process_tasks
from tests.support.backends import PROCESSES
from tests.support.programs import require
from tests.support.waiting import finished, running


class MakesDirectory:
    """An object that makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def invalid_bytes(kind: str, path: Path) -> bytes:
    """Return the bytes of invalid frames; `path` must not be made."""
    if kind == "code":
        evil = pickle.dumps((1, MakesDirectory(path)))
        return frame(evil) + frame(b"\1" + evil) + frame(b"\4" + evil)
    if kind == "length":
        return HEADER.pack(1 << 62) + b"garbage"
    if kind == "wrong types":
        return frame(b"\3" + pickle.dumps((None, "x", 7)))
    if kind == "wrong result":
        return frame(b"\4" + pickle.dumps(("id", "x", None, 5, [], "y", 7)))
    return {"garbage": frame(b"garbage"), "unknown": frame(b"\xff"), "empty": frame(b"")}[kind]


@pytest.mark.parametrize(
    "kind", ["garbage", "unknown", "empty", "length", "code", "wrong types", "wrong result"]
)
def test_invalid_frame_ends_only_its_worker(tmp_path: Path, kind: str) -> None:
    """The task of this worker fails, the web process executes nothing, and other tasks run."""
    require("os.mkfifo" if hasattr(os, "mkfifo") else None, "os.mkfifo")
    fifo, made = tmp_path / "fifo", tmp_path / "made"
    os.mkfifo(fifo)
    options = {"MAX_WORKERS": 2}
    with override_settings(TASKS={"default": {"BACKEND": PROCESSES, "OPTIONS": options}}):
        gated = process_tasks.gated.enqueue(str(fifo))
        running(gated)
        failed = finished(odd.send_bytes.enqueue(invalid_bytes(kind, made).hex()))
        assert failed.status == "FAILED"
        assert not made.exists()
        after = finished(process_tasks.noop.enqueue())
        assert after.status == "SUCCESSFUL"
        assert after.worker_ids != failed.worker_ids
        fifo.write_text("go")
        assert finished(gated).status == "SUCCESSFUL"


def test_options_that_a_worker_cannot_load_fail_only_their_task() -> None:
    """The task fails with the error of its options, and the worker runs the next task."""
    options = {"MAX_WORKERS": 1}
    with override_settings(TASKS={"default": {"BACKEND": PROCESSES, "OPTIONS": options}}):
        first = finished(process_tasks.noop.enqueue())
        labels: Any = replace(process_tasks.labels, label=Unloadable())
        failed = finished(labels.enqueue())
        assert failed.errors[0].exception_class is ValueError
        assert "not a number" in failed.errors[0].traceback
        assert finished(process_tasks.noop.enqueue()).worker_ids == first.worker_ids


def test_error_of_the_tasks_module_does_not_begin_with_an_internal_type_error() -> None:
    """The options of the task have a list, which is not hashable."""
    with pytest.raises(ImportError) as raised:
        load_task("tests.project.absent.task", ([],))
    error: BaseException | None = raised.value
    while error is not None:
        assert not isinstance(error, TypeError)
        error = error.__context__


class Unloadable:
    """An object that can be pickled, but not loaded."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)
