"""Hypothesis checks that a pool, its store and the hub agree after any sequence of worker steps."""

import itertools
from typing import Any

import pytest
from django.tasks import TaskResultStatus
from django.tasks.exceptions import TaskResultDoesNotExist
from django.utils import timezone
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

from django_tasks_local import ThreadPoolBackend, shutdown
from django_tasks_local.conf import ThreadOptions
from django_tasks_local.events import EventKind, Progress, TaskEvent
from django_tasks_local.exceptions import QueueFull
from django_tasks_local.execution import Outcome
from django_tasks_local.hub import hub
from django_tasks_local.identifiers import new_id
from django_tasks_local.pools import Pool
from django_tasks_local.pools.positions import Positions
from django_tasks_local.record import TaskRecord
from tests.project import tasks
from tests.support.stage import FakeTicker
from tests.support.state_machines import SHRINK_TIMEOUT, run_machine

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


class ManualPool(Pool[ThreadOptions, TaskRecord]):
    """A pool without workers: the state machine begins and finishes the tasks in their place."""

    def __init__(self, options: ThreadOptions) -> None:
        super().__init__(ThreadPoolBackend, "default", options)
        self.ticker = FakeTicker()
        self._positions = Positions(self.queue, self._unfinished, ticker=self.ticker)
        self.stopped: list[TaskRecord] = []
        # The machine compares the states after each step, so no other thread may call receivers.
        self._completion.post = self._completion.complete  # type: ignore[method-assign,assignment]

    @property
    def unfinished(self) -> set[str]:
        return {record.id for record in self._unfinished.records()}

    def _make_record(
        self, task: Any, args: list[Any], kwargs: dict[str, Any], carried: Any
    ) -> TaskRecord:
        return TaskRecord(task, new_id(), args, kwargs, self.alias, timezone.now(), 0.0)

    def _submit(self, record: TaskRecord) -> None:
        self.queue.append(record)

    def _stop(self, record: TaskRecord) -> None:
        self.stopped.append(record)

    def _send_started(self, record: TaskRecord) -> None:
        pass

    def _send_finished(self, record: TaskRecord, outcome: Outcome) -> None:
        self._completion.complete(record, outcome)

    def _close_workers(self) -> None:
        pass

    def count_workers(self) -> int:
        return 1


class PoolMachine(RuleBasedStateMachine):
    """
    The hub receives each event of a task once and in order, and its events agree with the store.
    """

    ids = Bundle("ids")

    @initialize(max_results=st.integers(1, 3), max_pending=st.none() | st.integers(0, 3))
    def start_pool(self, max_results: int, max_pending: int | None) -> None:
        self.pool = ManualPool(
            ThreadOptions(max_workers=1, max_results=max_results, max_pending=max_pending)
        )
        self.running: list[TaskRecord] = []
        self.ended: list[TaskRecord] = []
        self.events: list[TaskEvent] = []
        self.recording = hub.recording(self.events.append)
        self.recording.__enter__()

    @rule(target=ids)
    def enqueue(self) -> Any:
        options = self.pool.options
        known = len(hub)
        limit = None if options.max_pending is None else options.max_pending + options.max_workers
        if self.pool.closed:
            with pytest.raises(RuntimeError, match="shutting down"):
                self.pool.enqueue(tasks.noop, [], {})
        elif limit is not None and len(self.pool.unfinished) >= limit:
            with pytest.raises(QueueFull):
                self.pool.enqueue(tasks.noop, [], {})
        else:
            result = self.pool.enqueue(tasks.noop, [], {})
            assert hub.snapshot(result.id).position == len(self.pool.queue) - 1
            return result.id
        assert len(hub) == known
        return multiple()

    @precondition(lambda self: self.pool.queue)
    @rule()
    def begin(self) -> None:
        record = self.pool.queue.popleft()
        is_waiting = record.id in self.pool.unfinished
        begun = self.pool.begin(record, "worker")
        assert begun == is_waiting
        if begun:
            self.running.append(record)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), current=st.integers(0, 100))
    def report(self, data: st.DataObject, current: int) -> None:
        record = data.draw(st.sampled_from(self.running))
        record.get_reporter().report(current)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        record = data.draw(st.sampled_from(self.running))
        self.running.remove(record)
        outcome = Outcome.failure(ValueError("no")) if fails else Outcome(return_value=7)
        # close() has recorded an outcome for each task, so a later finish() returns False.
        assert self.pool.finish(record, outcome) == (not self.pool.closed)
        self.ended.append(record)

    @precondition(lambda self: self.ended)
    @rule(data=st.data())
    def finish_again(self, data: st.DataObject) -> None:
        record = data.draw(st.sampled_from(self.ended))
        # A sample may arrive after the end of its task.
        record.report(1000, Progress(current=1000))
        assert not self.pool.finish(record, Outcome(return_value="too late"))

    @rule(id=ids)
    def cancel(self, id: str) -> None:
        before = hub.snapshot(id)
        if before is None:
            with pytest.raises(TaskResultDoesNotExist):
                self.pool.cancel(id)
            return
        assert self.pool.cancel(id) == (not before.is_last)
        if before.status == READY:
            after = hub.snapshot(id)
            assert after is None or (after.error and after.error.reason == "cancelled")
        assert (before.status == RUNNING) == (id in {record.id for record in self.pool.stopped})
        self.pool.stopped.clear()

    @rule()
    def scan_queue(self) -> None:
        due, self.pool.ticker.due = self.pool.ticker.due, []
        assert len(due) <= 1
        for _, ticking in due:
            assert ticking.tick() is None
        waiting = [record.id for record in self.pool.queue if record.id in self.pool.unfinished]
        positions = [hub.snapshot(id).position for id in waiting]
        assert positions == list(range(len(waiting)))

    @precondition(lambda self: len(self.events) > 20)
    @rule()
    def close(self) -> None:
        unfinished = self.pool.unfinished
        running = unfinished & {record.id for record in self.running}
        began = len(self.events)
        self.pool.close(timeout=0)
        assert {record.id for record in self.pool.stopped} == running
        self.pool.stopped.clear()
        lost = [event for event in self.events[began:] if event.error]
        assert {event.id for event in lost} == unfinished
        assert {event.error.reason for event in lost if event.error} <= {"lost"}

    @invariant()
    def hub_agrees_with_store(self) -> None:
        ids = {record.id for record in self.pool.results.records()}
        published = {event.id for event in self.events}
        for id in published:
            event = hub.snapshot(id)
            assert (event is not None) == (id in ids)
            if event is not None:
                result = self.pool.results.get(id).task_result()
                assert event.status == result.status
                assert event.is_last == result.is_finished == (id not in self.pool.unfinished)
                assert event.started_at == result.started_at
                assert event.finished_at == result.finished_at
        assert len(ids) <= self.pool.options.max_results + len(self.pool.unfinished)

    @invariant()
    def queue_contains_unfinished_tasks_only(self) -> None:
        assert {record.id for record in self.pool.queue} <= set(self.pool.unfinished)

    @invariant()
    def events_of_each_task_are_ordered(self) -> None:
        order = list(EventKind)
        by_task: dict[str, list[TaskEvent]] = {}
        for event in self.events:
            by_task.setdefault(event.id, []).append(event)
        for id, of_task in by_task.items():
            assert all(a.version < b.version for a, b in itertools.pairwise(of_task))
            kinds = [order.index(event.kind) for event in of_task]
            assert kinds == sorted(kinds)
            assert kinds[0] == 0
            assert [event.is_last for event in of_task].count(True) == (
                id not in self.pool.unfinished
            )

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.discard()
            self.recording.__exit__(None, None, None)
            shutdown.unregister(self.pool)
            assert not any(hub.snapshot(event.id) for event in self.events)


@SHRINK_TIMEOUT
def test_pool_machine() -> None:
    run_machine(PoolMachine)
