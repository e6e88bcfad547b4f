"""TaskSignal sends and logs the signals of local tasks; it reads Django's lists of receivers."""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.dispatch import Signal
from django.tasks import signals as django_signals
from django.tasks import task_backends

from django_tasks_local import foreign, record
from django_tasks_local.exceptions import TaskCancelled, TaskLost, TaskTimeout
from django_tasks_local.execution import Outcome
from django_tasks_local.pools import signals
from django_tasks_local.pools.signals import TaskSignal
from django_tasks_local.testing import wait_until_idle
from tests.project import tasks
from tests.support.factories import task_record
from tests.support.waiting import finished

EACH_SIGNAL = pytest.mark.parametrize("name", ["enqueued", "started", "finished"])


def task_signal(name: str) -> TaskSignal:
    found: TaskSignal = getattr(signals, name)
    return found


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """
    Return a list that receives a task's id each time a TaskResult is made for a signal's receivers.
    """
    copied: list[str] = []
    send = TaskSignal.send

    def note(self: TaskSignal, sender: type, task_result: Any) -> None:
        copied.append(task_result.id)
        send(self, sender, task_result)

    monkeypatch.setattr(TaskSignal, "send", note)
    return copied


@pytest.fixture(params=["function", "of a sender", "with a dispatch_uid", "weak", "async"])
def receiver(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """
    Return a function that connects a receiver in the way of the parameter; disconnect it
    afterwards.
    """
    connected: list[tuple[Signal, dict[str, Any]]] = []
    sender = type(task_backends["default"])

    def connect(signal: Signal, called: list[str]) -> None:
        def note(**kwargs: Any) -> None:
            called.append(kwargs["task_result"].id)

        async def anote(**kwargs: Any) -> None:
            called.append(kwargs["task_result"].id)

        options: dict[str, Any] = {"receiver": note, "weak": False}
        match request.param:
            case "of a sender":
                options["sender"] = sender
            case "with a dispatch_uid":
                options["dispatch_uid"] = "another package"
            case "weak":
                options["weak"] = True
                kept.append(note)
            case "async":
                options["receiver"] = anote
        signal.connect(**options)
        options.pop("weak")
        connected.append((signal, options))

    kept: list[Any] = []
    yield connect
    for signal, options in connected:
        assert signal.disconnect(**options)


@EACH_SIGNAL
def test_only_the_log_and_this_package_receive(name: str) -> None:
    """
    Fail if a Django version changes the entries of Signal.receivers or connects more receivers.
    """
    signal = getattr(django_signals, f"task_{name}")
    keys = [entry[0] for entry in signal.receivers]
    uid = getattr(foreign, f"{name.upper()}_UID")
    log = getattr(django_signals, f"log_task_{name}")
    assert sorted(keys, key=str) == sorted([(uid, id(None)), (id(log), id(None))], key=str)
    assert not task_signal(name).has_receivers


def test_no_result_is_copied_without_a_receiver(copies: list[str]) -> None:
    finished(tasks.noop.enqueue())
    finished(tasks.fail.enqueue())
    assert copies == []


@EACH_SIGNAL
def test_each_kind_of_receiver_is_called(
    name: str, receiver: Callable[..., Any], copies: list[str]
) -> None:
    called: list[str] = []
    receiver(getattr(django_signals, f"task_{name}"), called)
    assert task_signal(name).has_receivers
    result = finished(tasks.noop.enqueue())
    task_backends["default"].wait_until_idle(10)  # type: ignore[attr-defined]
    assert called == [result.id]
    assert copies == [result.id]


def test_receivers_of_an_unknown_shape_are_sent_to() -> None:
    class UnknownSignal(Signal):
        def __init__(self, receivers: Any) -> None:
            super().__init__()
            self.receivers = receivers

    def log(**kwargs: Any) -> None:
        raise AssertionError("Not called.")

    for receivers in ([], [1, 2], [(), ()], [("key",), ("key",)], [(log,)] * 3):
        assert TaskSignal(UnknownSignal(receivers), log, "uid").has_receivers


def test_log_records_of_a_task(caplog: pytest.LogCaptureFixture) -> None:
    """
    Each task writes the same log records that Django's own receivers write when a signal is sent.
    """
    with caplog.at_level(logging.DEBUG, logger="django.tasks"):
        result = finished(tasks.noop.enqueue())
        failed = finished(tasks.fail.enqueue())
        wait_until_idle()  # The worker writes the last record after the event.
    by_id = {
        id: [(r.levelname, r.getMessage()) for r in caplog.records if id in r.getMessage()]
        for id in (result.id, failed.id)
    }
    path = "path=tests.project.tasks.noop"
    assert by_id[result.id] == [
        ("DEBUG", f"Task id={result.id} {path} enqueued backend=default"),
        ("INFO", f"Task id={result.id} {path} state=RUNNING"),
        ("INFO", f"Task id={result.id} {path} state=SUCCESSFUL"),
    ]
    assert [level for level, _ in by_id[failed.id]] == ["DEBUG", "INFO", "ERROR"]
    [error] = [r for r in caplog.records if r.levelname == "ERROR" and failed.id in r.getMessage()]
    assert error.exc_info is not None
    assert error.exc_info[0] is ValueError


def test_no_log_record_is_made_below_the_level(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    quiet = TaskSignal(Signal(), lambda **kwargs: calls.append(kwargs), "uid")
    monkeypatch.setattr(signals._tasks_logger, "level", logging.WARNING)
    signals._tasks_logger.manager._clear_cache()  # type: ignore[attr-defined]
    try:
        quiet.log(object, task_record(), logging.INFO)
        assert calls == []
        waiting: record.TaskRecord = task_record()
        quiet.log(object, waiting, logging.ERROR)
        assert calls == [{"sender": object, "task_result": waiting}]
    finally:
        monkeypatch.undo()
        signals._tasks_logger.manager._clear_cache()  # type: ignore[attr-defined]


def test_log_handler_that_raises_does_not_end_the_worker() -> None:
    class Broken(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise RuntimeError("a filter that reads what the record has not")

    broken = Broken()
    signals._tasks_logger.addFilter(broken)
    try:
        assert finished(tasks.add.enqueue(1)).return_value == 2
    finally:
        signals._tasks_logger.removeFilter(broken)
    assert finished(tasks.add.enqueue(2)).return_value == 3


@pytest.mark.parametrize("kind", [TaskCancelled, TaskLost, TaskTimeout])
@pytest.mark.parametrize("identified", [True, False])
def test_level_of_the_log_record_of_a_failure(
    kind: type[BaseException],
    identified: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    A cancelled or lost task is logged at INFO without a traceback, so that ADMINS get no mail.

    Other receivers are called as before. If Django's log receiver cannot be found, it logs an
    ERROR.
    """
    called: list[str] = []

    def note(task_result: Any, **kwargs: Any) -> None:
        called.append(task_result.id)

    if not identified:
        monkeypatch.setattr(signals.finished, "_django_key", None)
    failed = task_record()
    outcome = Outcome.failure(kind("a reason"))
    assert outcome.error is not None
    failed.fail(outcome.error, outcome.message)
    django_signals.task_finished.connect(note)
    try:
        with caplog.at_level(logging.INFO, "django.tasks"):
            state = signals.state_of_finished(failed, outcome)
            signals.send_finished(type(task_backends["default"]), state, None, outcome)
    finally:
        django_signals.task_finished.disconnect(note)
    assert called == [failed.id]
    (log,) = [log for log in caplog.records if log.name == "django.tasks"]
    is_error = kind is TaskTimeout or not identified
    assert log.levelno == (logging.ERROR if is_error else logging.INFO)
    assert bool(log.exc_info) == is_error
    assert log.getMessage() == f"Task id={failed.id} path={failed.path} state=FAILED"
