"""Hypothesis compares TaskRecords and their ResultStore with a model in any order of task steps."""

from typing import Any

import pytest
from django.tasks import TaskResultStatus
from django.tasks.base import TaskError
from django.tasks.exceptions import TaskResultDoesNotExist
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from django_tasks_local.exceptions import QueueFull
from django_tasks_local.hub import hub
from django_tasks_local.pools.store import ResultStore
from django_tasks_local.record import TaskRecord
from tests.support.factories import task_record
from tests.support.state_machines import SHRINK_TIMEOUT, run_machine

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


class StoreMachine(RuleBasedStateMachine):
    """
    A status only moves forward; the store evicts the oldest evictable results and no other results.
    """

    records = Bundle("records")
    error = TaskError(exception_class_path="builtins.ValueError", traceback="a traceback")

    @initialize(max_results=st.integers(1, 3), max_unfinished=st.none() | st.integers(1, 3))
    def start_with_an_empty_store(self, max_results: int, max_unfinished: int | None) -> None:
        self.max_results, self.max_unfinished = max_results, max_unfinished
        self.store = ResultStore(
            alias="default", max_results=max_results, max_unfinished=max_unfinished
        )
        self.statuses: dict[TaskRecord, TaskResultStatus] = {}
        self.published: list[TaskRecord] = []  # finished, but not yet evictable
        self.evictable: list[TaskRecord] = []
        self.evicted: list[TaskRecord] = []

    @property
    def unfinished(self) -> int:
        return sum(status in {READY, RUNNING} for status in self.statuses.values())

    @rule(target=records)
    def add(self) -> Any:
        record = task_record()
        if self.unfinished == self.max_unfinished:
            with pytest.raises(QueueFull):
                self.store.add(record)
            return multiple()
        self.store.add(record)
        record.enqueue(0)
        self.statuses[record] = READY
        return record

    @rule(record=records)
    def start(self, record: TaskRecord) -> None:
        self.check_move(record, {READY}, RUNNING, record.start("worker"))

    @rule(record=records)
    def succeed(self, record: TaskRecord) -> None:
        self.check_move(record, {RUNNING}, SUCCESSFUL, record.succeed(7))

    @rule(record=records, only_waiting=st.booleans())
    def fail(self, record: TaskRecord, only_waiting: bool) -> None:
        legal = {READY} if only_waiting else {READY, RUNNING}
        moved = record.fail(self.error, "a message", only_waiting=only_waiting)
        self.check_move(record, legal, FAILED, moved)

    def check_move(self, record: TaskRecord, legal: set[Any], to: Any, moved: bool) -> None:
        assert moved == (self.statuses.get(record) in legal)
        if moved:
            self.statuses[record] = to
            if to is not RUNNING:
                self.published.append(record)

    @rule(record=records)
    def change_a_snapshot(self, record: TaskRecord) -> None:
        """
        Change a returned TaskResult; get() then checks that the record has not changed with it.
        """
        result = record.task_result()
        result.errors.clear()
        result.worker_ids.append("not in the record")
        result.args.append("not in the record")
        result.kwargs["not"] = "in the record"

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def make_evictable(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(self.published))
        self.published.remove(record)
        self.evictable.append(record)
        evicted, self.evictable = (
            self.evictable[: -self.max_results],
            self.evictable[-self.max_results :],
        )
        assert self.store.make_evictable(record) == evicted
        for old in evicted:
            hub.release(old)
            self.evicted.append(old)
            self.statuses.pop(old)

    @rule(record=records)
    def get(self, record: TaskRecord) -> None:
        if record in self.evicted:
            with pytest.raises(TaskResultDoesNotExist):
                self.store.get(record.id)
            return
        assert self.store.get(record.id) is record
        result = record.task_result()
        assert result.status == self.statuses[record]
        assert result.is_finished == (result.finished_at is not None) == record.is_finished
        assert (result.status == FAILED) == (len(result.errors) == 1)
        assert result.worker_ids == (["worker"] if result.started_at else [])
        assert (result.args, result.kwargs) == ([], {})
        if result.status == SUCCESSFUL:
            assert result.return_value == 7

    @invariant()
    def the_hub_agrees(self) -> None:
        for record, status in self.statuses.items():
            event = hub.snapshot(record.id)
            assert event is record.event
            assert event.status == status
            assert event.is_last == record.is_finished
            assert event.run == (0 if record.started_at is None else 1)

    @invariant()
    def the_store_has_what_the_model_has(self) -> None:
        assert set(self.store.records()) == set(self.statuses)
        assert len(self.statuses) <= self.max_results + self.unfinished + len(self.published)

    def teardown(self) -> None:
        for record in self.statuses:
            hub.release(record)


@SHRINK_TIMEOUT
def test_store_machine() -> None:
    run_machine(StoreMachine)
