"""A pool around the store and the hub, in any interleaving of what its workers do."""

import itertools
from typing import Any

import pytest
from django.tasks import TaskResultStatus
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

from django_tasks_local import ThreadPoolBackend, shutdown
from django_tasks_local.conf import ThreadOptions
from django_tasks_local.events import EventKind, TaskEvent
from django_tasks_local.exceptions import QueueFull
from django_tasks_local.execution import Outcome
from django_tasks_local.hub import hub
from django_tasks_local.pools import Job, Pool
from django_tasks_local.positions import Positions
from django_tasks_local.progress.reporter import Reporter
from tests.support.factories import task_result
from tests.support.stage import FakeTicker
from tests.support.state_machines import SIMPLIFYING, run_machine

READY, RUNNING = TaskResultStatus.READY, TaskResultStatus.RUNNING
FAILED, SUCCESSFUL = TaskResultStatus.FAILED, TaskResultStatus.SUCCESSFUL


class ManualPool(Pool[ThreadOptions]):
    """A pool whose workers are the test."""

    def __init__(self, options: ThreadOptions) -> None:
        super().__init__(ThreadPoolBackend, "default", options)
        self.ticker = FakeTicker()
        self._positions = Positions(self.queue, self._jobs, ticker=self.ticker)
        self.stopped: list[Job] = []

    def _submit(self, job: Job) -> None:
        self.queue.append(job)

    def _stop(self, job: Job) -> None:
        self.stopped.append(job)

    def close_workers(self) -> None:
        pass


class PoolMachine(RuleBasedStateMachine):
    """The hub tells each task's life in order and once, and what it says agrees with the store."""

    ids = Bundle("ids")

    @initialize(max_results=st.integers(1, 3), max_pending=st.none() | st.integers(0, 3))
    def start_anew(self, max_results: int, max_pending: int | None) -> None:
        self.pool = ManualPool(
            ThreadOptions(max_workers=1, max_results=max_results, max_pending=max_pending)
        )
        self.running: list[Job] = []
        self.over: list[Job] = []
        self.events: list[TaskEvent] = []
        self.recording = hub.recording(self.events.append)
        self.recording.__enter__()

    @rule(target=ids)
    def enqueue(self) -> Any:
        result = task_result()
        options = self.pool.options
        limit = None if options.max_pending is None else options.max_pending + options.max_workers
        if self.pool.closed:
            with pytest.raises(RuntimeError, match="shutting down"):
                self.pool.enqueue(result)
        elif limit is not None and len(self.pool._jobs) >= limit:
            with pytest.raises(QueueFull):
                self.pool.enqueue(result)
        else:
            self.pool.enqueue(result)
            assert hub.snapshot(result.id).position == len(self.pool.queue) - 1
            return result.id
        assert hub.snapshot(result.id) is None
        return multiple()

    @precondition(lambda self: self.pool.queue)
    @rule()
    def begin(self) -> None:
        job = self.pool.queue.popleft()
        job.reporter = Reporter(job.report, 0.0, job.get_cancellation(), ticker=FakeTicker())
        is_waiting = job.result_id in self.pool._jobs
        begun = self.pool.begin(job, "worker")
        assert (begun is not None) == is_waiting
        if begun is not None:
            self.running.append(job)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), current=st.integers(0, 100))
    def report(self, data: st.DataObject, current: int) -> None:
        job = data.draw(st.sampled_from(self.running))
        assert isinstance(job.reporter, Reporter)
        job.reporter.report(current)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), fails=st.booleans())
    def finish(self, data: st.DataObject, fails: bool) -> None:
        job = data.draw(st.sampled_from(self.running))
        self.running.remove(job)
        outcome = Outcome.failure(ValueError("no")) if fails else Outcome(return_value=7)
        # After close() it has an outcome already.
        assert self.pool.finish(job, outcome) == (not self.pool.closed)
        self.over.append(job)

    @precondition(lambda self: self.over)
    @rule(data=st.data())
    def finish_again(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.over))
        job.publication.progress(1000, job.reporter.close()[1])  # a sample that was on its way
        assert not self.pool.finish(job, Outcome(return_value="too late"))

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
        assert (before.status == RUNNING) == (id in {job.result_id for job in self.pool.stopped})
        self.pool.stopped.clear()

    @rule()
    def look_at_the_queue(self) -> None:
        due, self.pool.ticker.due = self.pool.ticker.due, []
        assert len(due) <= 1
        for _, ticking in due:
            assert ticking.tick() is None
        waiting = [job.result_id for job in self.pool.queue if job.result_id in self.pool._jobs]
        positions = [hub.snapshot(id).position for id in waiting]
        assert positions == list(range(len(waiting)))

    @precondition(lambda self: len(self.events) > 20)
    @rule()
    def close(self) -> None:
        unfinished = set(self.pool._jobs)
        running = unfinished & {job.result_id for job in self.running}
        began = len(self.events)
        self.pool.close(timeout=0)
        assert {job.result_id for job in self.pool.stopped} == running
        self.pool.stopped.clear()
        lost = [event for event in self.events[began:] if event.error]
        assert {event.id for event in lost} == unfinished
        assert {event.error.reason for event in lost if event.error} <= {"lost"}

    @invariant()
    def the_hub_agrees_with_the_store(self) -> None:
        ids = self.pool.results.ids()
        told = {event.id for event in self.events}
        for id in told:
            event = hub.snapshot(id)
            assert (event is not None) == (id in ids)
            if event is not None:
                result = self.pool.results.get(id)
                assert event.status == result.status
                assert event.is_last == result.is_finished == (id not in self.pool._jobs)
                assert event.started_at == result.started_at
                assert event.finished_at == result.finished_at
        assert len(ids) <= self.pool.options.max_results + len(self.pool._jobs)

    @invariant()
    def nothing_is_in_the_queue_for_nothing(self) -> None:
        assert {job.result_id for job in self.pool.queue} <= set(self.pool._jobs)

    @invariant()
    def each_life_is_told_in_order(self) -> None:
        order = list(EventKind)
        lives: dict[str, list[TaskEvent]] = {}
        for event in self.events:
            lives.setdefault(event.id, []).append(event)
        for id, life in lives.items():
            assert all(a.version < b.version for a, b in itertools.pairwise(life))
            kinds = [order.index(event.kind) for event in life]
            assert kinds == sorted(kinds)
            assert kinds[0] == 0
            assert [event.is_last for event in life].count(True) == (id not in self.pool._jobs)

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            self.pool.discard()
            self.recording.__exit__(None, None, None)
            shutdown.unregister(self.pool)
            assert not any(hub.snapshot(event.id) for event in self.events)


@SIMPLIFYING
def test_any_interleaving() -> None:
    run_machine(PoolMachine)
