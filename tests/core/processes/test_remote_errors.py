"""The exception of a log record in the parent has the class and the frames of the task's error."""

import logging
from collections.abc import Iterator
from pathlib import Path
from traceback import extract_tb, format_exception
from typing import Any

import pytest

from django_tasks_local.processes.remote_errors import RemoteError, describe, rebuild
from tests.project import process_tasks as tasks
from tests.project.tasks import DemandingError
from tests.support.backends import settings_with
from tests.support.waiting import finished, wait_until


class Outer:
    """Contains an exception class, whose qualified name has two parts."""

    class InnerError(Exception):
        """An exception class inside of another class."""


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """Raise `error` from `cause`, and return it with its traceback."""
    try:
        raise error from cause
    except BaseException as caught:  # noqa: BLE001
        return caught


def rebuilt(error: BaseException) -> RemoteError:
    """Return the exception that the parent makes of the description of this error."""
    return rebuild(describe(error), "the text of an invalid description")


@pytest.fixture
def two_workers() -> Iterator[None]:
    """Configure the aliases of settings_with()."""
    with settings_with():
        yield


@pytest.mark.usefixtures("two_workers")
def test_all_errors_of_process_tasks_have_one_class(caplog: pytest.LogCaptureFixture) -> None:
    """Sentry groups errors by class and frames, so two kinds of errors must differ in both."""
    with caplog.at_level(logging.ERROR, "django.tasks"):
        for kind in ("value", "demanding"):
            finished(tasks.fail.using(backend="processes").enqueue(kind))
        wait_until(lambda: len(caplog.records) == 2, "the two errors are not logged")
    classes = []
    for record in caplog.records:
        assert record.exc_info is not None
        kind, error, traceback = record.exc_info
        assert kind is not None
        assert issubclass(kind, RemoteError)
        classes.append((kind.__module__, kind.__qualname__, str(error)))
        last = extract_tb(traceback)[-1]
        assert (Path(last.filename).name, last.name) == ("process_tasks.py", "fail")
        assert last.line == "raise errors[kind]"
        assert traceback is not None
        while traceback.tb_next is not None:
            traceback = traceback.tb_next
        assert traceback.tb_frame.f_globals["__name__"] == "tests.project.process_tasks"
    assert classes == [
        ("builtins", "ValueError", "bad value"),
        ("tests.project.tasks", "DemandingError", "7: because"),
    ]


@pytest.mark.parametrize(
    "error",
    [
        raised(ValueError("text")),
        raised(Outer.InnerError("text")),
        raised(KeyError("key"), cause=raised(OSError(2, "no file"))),
        raised(ExceptionGroup("several", [raised(ValueError("one")), TypeError("two")])),
        raised(DemandingError(7, "because")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_is_printed_as_the_original(error: BaseException) -> None:
    assert "".join(format_exception(rebuilt(error))) == without_marks(error)


def without_marks(error: BaseException) -> str:
    """Return the traceback of an error without the lines that mark a part of the line above."""
    lines = "".join(format_exception(error)).splitlines(keepends=True)
    return "".join(line for line in lines if not set(line.strip(" |\n")) & set("^~"))


def test_error_that_was_raised_while_handling_another() -> None:
    try:
        try:
            raise KeyError("first")
        except KeyError:
            raise ValueError("second")  # noqa: B904 - the test checks the implicit context
    except ValueError as error:
        exception = rebuilt(error)
    assert type(exception.__context__).__qualname__ == "KeyError"


def test_frames_keep_no_other_frame_alive() -> None:
    traceback = rebuilt(raised(ValueError("text"))).__traceback__
    assert traceback is not None
    assert traceback.tb_frame.f_back is None


@pytest.mark.parametrize(
    "description",
    [
        (),
        ("module", "name\0", "text", [], None, None, []),
        ("module", "name", "text", [("file",)], None, None, []),
        ("module", "name", "text", [], None, None, [1]),
    ],
)
def test_invalid_description_gives_the_text(description: Any) -> None:
    error = rebuild(description, "builtins.ValueError: bad value")
    assert type(error) is RemoteError
    assert str(error) == "builtins.ValueError: bad value"
