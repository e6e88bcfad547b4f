"""The result store, in any interleaving of its steps."""

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
from django_tasks_local.results import ResultStore
from tests.support.factories import task_result
from tests.support.state_machines import SIMPLIFYING, run_machine
from tests.support.waiting import AnyResult

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


class StoreMachine(RuleBasedStateMachine):
    """A status moves forward only; the oldest finished results go first, and no others."""

    ids = Bundle("ids")
    error = TaskError(exception_class_path="builtins.ValueError", traceback="a traceback")

    @initialize(max_results=st.integers(1, 3), max_unfinished=st.none() | st.integers(1, 3))
    def start_anew(self, max_results: int, max_unfinished: int | None) -> None:
        self.max_results, self.max_unfinished = max_results, max_unfinished
        self.store = ResultStore(
            alias="default", max_results=max_results, max_unfinished=max_unfinished
        )
        self.statuses: dict[str, TaskResultStatus] = {}
        self.unsettled: list[str] = []
        self.settled: list[str] = []

    @property
    def unfinished(self) -> int:
        return sum(status in {READY, RUNNING} for status in self.statuses.values())

    @rule(target=ids)
    def add(self) -> Any:
        result = task_result()
        if self.unfinished == self.max_unfinished:
            with pytest.raises(QueueFull):
                self.store.add(result)
            return multiple()
        self.store.add(result)
        self.statuses[result.id] = READY
        return result.id

    @rule(id=ids)
    def start(self, id: str) -> None:
        self.move(id, {READY}, RUNNING, self.store.start(id, "worker"))

    @rule(id=ids, failed=st.booleans())
    def finish(self, id: str, failed: bool) -> None:
        changed = self.store.finish(id, 7, self.error if failed else None)
        self.move(id, {READY, RUNNING}, FAILED if failed else SUCCESSFUL, changed)

    @rule(id=ids)
    def fail_waiting(self, id: str) -> None:
        self.move(id, {READY}, FAILED, self.store.fail_waiting(id, self.error))

    def move(self, id: str, legal: set[Any], to: Any, changed: AnyResult | None) -> None:
        assert (changed is not None) == (self.statuses.get(id) in legal)
        if changed is not None:
            assert (changed.id, changed.status) == (id, to)
            changed.errors.clear()
            changed.worker_ids.append("not in the store")
            self.statuses[id] = to
            if to is not RUNNING:
                self.unsettled.append(id)

    @precondition(lambda self: self.unsettled)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(self.unsettled))
        self.unsettled.remove(id)
        self.settled.append(id)
        evicted, self.settled = (
            self.settled[: -self.max_results],
            self.settled[-self.max_results :],
        )
        assert self.store.settle(id) == evicted
        for old in evicted:
            del self.statuses[old]

    @rule(id=ids)
    def get(self, id: str) -> None:
        if id not in self.statuses:
            with pytest.raises(TaskResultDoesNotExist):
                self.store.get(id)
            return
        result = self.store.get(id)
        assert result.status == self.statuses[id]
        assert result.is_finished == (result.finished_at is not None)
        assert (result.status == FAILED) == (len(result.errors) == 1)
        assert result.worker_ids == (["worker"] if result.started_at else [])

    @invariant()
    def the_store_has_what_the_model_has(self) -> None:
        assert set(self.store.ids()) == set(self.statuses)
        assert len(self.statuses) <= self.max_results + self.unfinished + len(self.unsettled)
        assert len(self.store._unfinished) == self.unfinished


@SIMPLIFYING
def test_any_interleaving() -> None:
    run_machine(StoreMachine)
