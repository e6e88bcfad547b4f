"""TaskRecord, make_result(), task ids, references to tasks, and finalizers that a task runs."""

import functools
import subprocess
import sys
import threading
import uuid
from dataclasses import fields
from typing import Any

import pytest
from django.tasks import TaskResult, TaskResultStatus
from django.tasks.base import TaskError
from django.utils import timezone

from django_tasks_local import identifiers, results
from django_tasks_local.aliases import task_reference
from django_tasks_local.events import Progress, TaskEvent
from django_tasks_local.hub import hub
from django_tasks_local.record import LEGAL_MOVES
from django_tasks_local.results import make_result
from tests.project import tasks
from tests.support.factories import event, task_record, task_result
from tests.support.interruptions import each_call
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL
ERROR = TaskError(exception_class_path="builtins.ValueError", traceback="ValueError: no")


def test_legal_moves() -> None:
    assert set(LEGAL_MOVES) == {
        (READY, RUNNING),
        (READY, FAILED),
        (RUNNING, SUCCESSFUL),
        (RUNNING, FAILED),
    }


def test_event_is_the_same_object_until_there_is_a_later_one() -> None:
    record = task_record()
    first = record.event
    assert record.event is first
    assert (first.kind, first.run, first.sequence) == ("enqueued", 0, 1)
    assert record.start("worker")
    started = record.event
    assert (started.kind, started.run, started.sequence) == ("started", 1, 2)
    assert started.version > first.version
    record.report(1, Progress(current=1))
    record.report(3, Progress(current=3))
    record.report(2, Progress(current=2))
    assert (record.event.kind, record.event.sequence, record.event.progress.current) == (
        "progress",
        5,
        3,
    )
    assert record.succeed(7)
    assert (record.event.kind, record.event.sequence) == ("finished", 6)
    record.report(9, Progress(current=9))
    assert record.event.progress.current == 3


def test_first_outcome_counts() -> None:
    record = task_record()
    assert not record.succeed(7), "a task that has not started cannot succeed"
    assert record.fail(ERROR, "no")
    assert not record.start("worker")
    assert not record.fail(ERROR, "again")
    assert record.event.error.message == "no"
    assert record.task_result().errors == [ERROR]


def test_task_that_never_started_ends_without_a_run() -> None:
    record = task_record()
    assert record.fail(ERROR, "no")
    assert (record.event.kind, record.event.run) == ("finished", 0)


def test_finalizer_ends_the_task_while_its_event_is_read() -> None:
    """
    If a finalizer fails the task while take() reads its event, subscription, hub and record agree.
    """
    for interruption in each_call():
        record = task_record()
        record.enqueue(0)
        with hub.subscribe(record.task_result()) as subscription:
            with interruption.by(functools.partial(record.fail, ERROR, "no")):
                subscription.take(timeout=0)
            subscription.take(timeout=0)
            assert subscription.ended
        assert record.status == FAILED
        assert hub.snapshot(record.id).kind == "finished"
        hub.release(record)


def test_finalizers_of_two_threads_close_subscriptions_to_each_others_task(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """
    Two threads do not deadlock if finalizers call close() while both threads create an event.

    Each thread creates the event of its own task; its finalizer then closes the subscription to the
    other thread's task.
    """
    records = [task_record(), task_record()]
    subscriptions = {record.id: hub.subscribe(record.task_result()) for record in records}
    both = threading.Barrier(2)

    def create_event(**values: Any) -> TaskEvent:
        if values["id"] in others:
            other = others.pop(values["id"])
            both.wait(LIMIT)
            subscriptions[other].close()
        return TaskEvent(**values)

    others = {records[0].id: records[1].id, records[1].id: records[0].id}
    for record in records:
        record.enqueue(0)
        subscriptions[record.id].__enter__()
    monkeypatch.setattr("django_tasks_local.record.TaskEvent", create_event)
    threads = [
        threading.Thread(target=lambda record=record: record.event, daemon=True)  # type: ignore[misc]
        for record in records
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert not any(thread.is_alive() for thread in threads)
    assert others == {}
    assert not any(record.readers for record in records)
    for record in records:
        hub.release(record)


def test_unpublished_task_does_not_fail_as_waiting() -> None:
    record = task_record()
    assert not record.fail(ERROR, "no", only_waiting=True)
    record.enqueue(0)
    assert record.fail(ERROR, "no", only_waiting=True)
    hub.release(record)


def test_subscription_that_waits_for_the_id_of_a_new_task() -> None:
    """
    Subscriptions by id and by result that open before enqueue() receive the events of the task.
    """
    record = task_record()
    with (
        hub.subscribe(record.id) as by_id,
        hub.subscribe(record.task_result()) as by_result,
        hub.subscribe("another id") as other,
    ):
        record.enqueue(0)
        for subscription in (by_id, by_result):
            assert [e.kind for e in subscription.take(LIMIT)] == ["enqueued"]
        record.start("worker")
        record.succeed(1)
        for subscription in (by_id, by_result):
            assert [e.kind for e in subscription] == ["finished"]
        assert other.take(timeout=0) == []
    hub.release(record)
    assert hub.snapshot(record.id) is None


def values_of(result: Any) -> dict[str, Any]:
    return {field.name: getattr(result, field.name) for field in fields(TaskResult)}


def test_results_have_all_fields_of_django() -> None:
    """
    Fail if a Django version changes the fields: make_result() then needs the slower TaskResult().
    """
    assert {field.name for field in fields(TaskResult)} == {*results.FIELDS}
    assert results._setters is not None


@pytest.mark.parametrize("fast", [True, False])
def test_made_result_equals_a_constructed_one(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(results, "_setters", None)
    now = timezone.now()
    made = make_result(
        tasks.add, "id", SUCCESSFUL, now, now, now, [1], {"a": 2}, "default", [], ["worker"], 3
    )
    expected = TaskResult(
        task=tasks.add,
        id="id",
        status=SUCCESSFUL,
        enqueued_at=now,
        started_at=now,
        finished_at=now,
        last_attempted_at=now,
        args=[1],
        kwargs={"a": 2},
        backend="default",
        errors=[],
        worker_ids=["worker"],
    )
    object.__setattr__(expected, "_return_value", 3)
    assert values_of(made) == values_of(expected)
    assert (made.return_value, made.attempts, made.is_finished) == (3, 1, True)


def test_ids_are_random_uuids() -> None:
    ids = [identifiers.new_id() for _ in range(3 * identifiers.BATCH)]
    assert len(set(ids)) == len(ids)
    for id in ids:
        parsed = uuid.UUID(id)
        assert (str(parsed), parsed.version, parsed.variant) == (id, 4, uuid.RFC_4122)


def test_ids_of_several_threads_are_different() -> None:
    ids: list[str] = []
    threads = [
        threading.Thread(target=lambda: ids.extend(identifiers.new_id() for _ in range(1000)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(set(ids)) == len(ids) == 4000


def test_references_to_a_task() -> None:
    result = task_result()
    id = uuid.uuid4()
    assert task_reference(result) == ("default", result.id)
    assert task_reference(event("1", 1, backend="other")) == ("other", "1")
    assert task_reference("1") == (None, "1")
    assert task_reference(id) == (None, str(id))
    with pytest.raises(TypeError, match="not by 7"):
        task_reference(7)


FINALIZERS = """
import gc
import django
from django.conf import settings
settings.configure(
    TASKS={
        "default": {
            "BACKEND": "django_tasks_local.ThreadPoolBackend",
            "OPTIONS": {"PROGRESS_INTERVAL": 0},
        },
        "immediate": {"BACKEND": "django.tasks.backends.immediate.ImmediateBackend"},
    }
)
django.setup()
from django.tasks import task
from django_tasks_local import report_progress
from django_tasks_local.hub import hub

class Loud:
    def __init__(self):
        self.cycle = self  # so that only the garbage collector finalizes it, at any allocation

    def __del__(self):
        report_progress(message="finalized")
        hub.subscribe("an id").__enter__().close()

@task
def loud():
    for step in range(1000):
        Loud()
        report_progress(step % 100, message=str(step))

gc.set_threshold(3)
Loud()
result = loud.enqueue()
with hub.subscribe(result) as subscription, hub.subscribe() as to_all:
    while not subscription.ended:
        assert subscription.take(60), "deadlock"
        to_all.take(0)
print(loud.using(backend="immediate").enqueue().status)
result.refresh()
print(result.status, hub.statistics().subscriptions)
"""


def test_finalizer_that_reports_while_its_task_publishes() -> None:
    """
    A finalizer may report and subscribe in a thread that holds the locks of its task and of the
    hub.
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FINALIZERS],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=100,
        check=False,
    )
    assert done.stdout.split() == ["SUCCESSFUL", "SUCCESSFUL", "0"], done.stderr
