"""
Enqueue 50,000 tasks of every kind in 8 threads, cancel 15 % of them, and read their events.

    uv run stress/storm.py [--tasks 50000] [--runs 10] [--seed 1] [--processes]

The checks are in histories.py: each task has exactly one `finished` event; the hub accepts the
events of a task in order, and each reader receives them in order and receives the last one; no task
runs twice; `get_result()` and the hub's snapshot agree in status, times, error and return value;
each outcome is that of the task or of a cancellation; the backend never evicts an unfinished task.
The program uses only the public API and `hub.recording()`. It connects no receivers to Django's
signals, because the package has a faster path for tasks without receivers.

With --processes 4 % of the tasks run in two worker processes. The program prints one line for each
run; the exit status is 1 if there is a violation. The seed determines the tasks and the
cancellations, but not how the threads interleave.
"""

import argparse
import asyncio
import faulthandler
import logging
import os
import random
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import django
from django.conf import settings

if not settings.configured:
    os.environ["DJANGO_SETTINGS_MODULE"] = "stress.storm_settings"
    django.setup()

from django.tasks import task_backends
from django.tasks.exceptions import TaskResultDoesNotExist
from django.test import override_settings

from django_tasks_local import cancel
from django_tasks_local.events import TaskEvent
from django_tasks_local.exceptions import QueueFull
from django_tasks_local.hub import hub
from stress import storm_tasks
from stress.histories import History, ReaderHistory, wrong_history
from stress.invariants import Violation, show
from stress.storm_settings import FEW_RESULTS

ENQUEUERS, CANCELLERS, THREAD_READERS, LOOP_READERS = 8, 3, 3, 6
CANCELLED = 0.15  # The share of the tasks that the program cancels.
WAITING = 0.002  # The share of the tasks that wait until the program cancels them.
IN_PROCESSES = 0.04  # The share of the tasks in the backend `processes`, with --processes.
EVICTED = 0.1  # The share of the tasks in the backend `evicting`, which keeps few results.
EARLY = 0.3  # The share of the cancellations directly after enqueue().
MAX_DELAY = 0.3  # The maximum of seconds between enqueue() and any other cancellation.
# The share of the subscriptions to all tasks. It is small, because each such subscription first
# receives the state of every task.
ALL_TASKS = 0.001
RECENT = 200  # Readers choose among this number of the newest tasks.
PATIENCE = 60.0  # If no task finishes for this number of seconds, the run ends with a violation.
SHOWN = 20  # The maximum number of violations that a run prints.


class Storm:
    """Runs the threads of one run, records their data and checks them."""

    def __init__(self, tasks: int, seed: int, *, processes: bool) -> None:
        self.tasks = tasks
        self.seed = seed
        self.processes = processes
        self.over = threading.Event()
        # All threads append to the deques below without a lock, because append() on a deque is
        # atomic. The main thread reads them.
        self.recorded: deque[TaskEvent] = deque()
        # The tasks as tuples of alias, id and expected outcome.
        self.enqueued: deque[tuple[str, str, storm_tasks.Expected]] = deque()
        # The ids of tasks, appended before the call of cancel().
        self.cancel_calls: deque[str] = deque()
        self.violations: deque[Violation] = deque()
        self.readers: deque[ReaderHistory] = deque()
        self.recent: deque[str] = deque(maxlen=RECENT)
        # The planned cancellations as tuples of time.monotonic() at which to cancel, alias and id.
        self.to_cancel: deque[tuple[float, str, str]] = deque()
        self.numbers = count()

    def violate(self, task_id: str, text: str, events: list[TaskEvent] | None = None) -> None:
        """Record a violation. Called from any thread."""
        self.violations.append(Violation(task_id, text, tuple(map(show, events or ()))))

    # Actions. start() runs each of them in threads of its own.

    def enqueue(self, rng: random.Random, tasks: int) -> None:
        """Enqueue `tasks` tasks and arrange the cancellation of some of them."""
        for _ in range(tasks):
            alias, choices = self.draw_backend(rng)
            must_be_cancelled = rng.random() < WAITING
            if must_be_cancelled:
                choices = storm_tasks.TO_BE_CANCELLED
            [(_, task, draw)] = rng.choices(choices, [weight for weight, _, _ in choices])
            arguments, expected = draw(rng)
            result_id = self.enqueue_one(task.using(backend=alias), arguments)
            self.enqueued.append((alias, result_id, expected))
            self.recent.append(result_id)
            if must_be_cancelled or rng.random() < CANCELLED:
                if rng.random() < EARLY:
                    self.cancel_one(alias, result_id)
                else:
                    due = time.monotonic() + rng.uniform(0, MAX_DELAY)
                    self.to_cancel.append((due, alias, result_id))

    def draw_backend(self, rng: random.Random) -> tuple[str, tuple[Any, ...]]:
        """Return an alias and the tasks that its backend can run."""
        number = rng.random()
        if self.processes and number < IN_PROCESSES:
            return "processes", storm_tasks.ANYWHERE
        if number > 1 - EVICTED:
            return "evicting", storm_tasks.IN_THREADS
        return "default", storm_tasks.IN_THREADS

    def enqueue_one(self, task: Any, arguments: tuple[Any, ...]) -> str:
        """Enqueue a task and return its id; retry every 2 ms while enqueue() raises QueueFull."""
        while True:
            try:
                result_id: str = task.enqueue(*arguments).id
            except QueueFull:
                time.sleep(0.002)
            else:
                return result_id

    def cancel(self, rng: random.Random) -> None:
        """Cancel tasks when they are due, until the run is over."""
        while not self.over.is_set():
            try:
                due, alias, result_id = self.to_cancel.popleft()
            except IndexError:
                self.over.wait(0.01)
                continue
            time.sleep(max(0.0, due - time.monotonic()))
            self.cancel_one(alias, result_id)

    def cancel_one(self, alias: str, result_id: str) -> None:
        """Cancel a task; check that a refused cancellation means that the task has finished."""
        self.cancel_calls.append(result_id)
        try:
            if cancel(result_id, backend=alias):
                return
            is_finished = task_backends[alias].get_result(result_id).is_finished
        except TaskResultDoesNotExist:
            # The backend `evicting` may have evicted a finished task. If it evicts an unfinished
            # one, wrong_history() reports that.
            is_finished = alias == "evicting"
        if not is_finished:
            self.violate(result_id, "cancel() returned False before the task had finished")

    # Methods that read events, in threads and in an event loop.

    def draw_ids(self, rng: random.Random) -> frozenset[str]:
        """Return some recent ids, or rarely none, which subscribes to every task."""
        recent = list(self.recent.copy())
        if not recent or rng.random() < ALL_TASKS:
            return frozenset()
        return frozenset(rng.choices(recent, k=rng.randint(1, 20)))

    def read_in_threads(self, rng: random.Random) -> None:
        """Subscribe to random tasks and read for up to 2 s; repeat this until the run is over."""
        while not self.over.is_set():
            ids = self.draw_ids(rng)
            reader = ReaderHistory(f"thread-{next(self.numbers)}", ids)
            deadline = time.monotonic() + rng.uniform(0, 2)
            with hub.subscribe(*ids) as subscription:
                while self.goes_on(subscription, deadline):
                    reader.read(subscription.take(rng.choice((0, 0.01, 0.2))))
                    if rng.random() < 0.05:
                        # The reader takes no events for up to 0.2 s.
                        self.over.wait(rng.uniform(0, 0.2))
                if subscription.ended:
                    reader.must_have_seen_the_end(ids)
            self.close_reader(reader)

    async def read_in_loop(self, rng: random.Random) -> None:
        """Do the same as read_in_threads() in an asyncio task."""
        while not self.over.is_set():
            ids = self.draw_ids(rng)
            reader = ReaderHistory(f"loop-{next(self.numbers)}", ids)
            deadline = time.monotonic() + rng.uniform(0, 2)
            async with hub.subscribe(*ids) as subscription:
                while self.goes_on(subscription, deadline):
                    reader.read(await subscription.atake(rng.choice((0, 0.01, 0.2))))
                    await asyncio.sleep(rng.uniform(0, 0.2) if rng.random() < 0.05 else 0)
                if subscription.ended:
                    reader.must_have_seen_the_end(ids)
            self.close_reader(reader)

    def goes_on(self, subscription: Any, deadline: float) -> bool:
        """Return whether a reader should take events from its subscription again."""
        late = time.monotonic() >= deadline or self.over.is_set()
        return not (late or subscription.ended)

    def read_everything(self) -> None:
        """Read every task from the beginning to the end of the run, in a thread."""
        reader = ReaderHistory("thread-everything")
        with hub.subscribe() as subscription:
            self.subscribed.wait()
            while not self.over.is_set():
                reader.read(subscription.take(0.05))
            reader.read(subscription.take(0))
            reader.must_have_seen_the_end(self.ids, missed=subscription.missed)
        self.close_reader(reader)

    async def aread_everything(self) -> None:
        """Do the same as read_everything() in an asyncio task."""
        reader = ReaderHistory("loop-everything")
        async with hub.subscribe() as subscription:
            await asyncio.to_thread(self.subscribed.wait)
            while not self.over.is_set():
                reader.read(await subscription.atake(0.05))
            # The event loop may have scheduled a wake-up of the subscription. Let it run before the
            # last read, because that returns only what the subscription has received.
            await asyncio.sleep(0)
            reader.read(await subscription.atake(0))
            reader.must_have_seen_the_end(self.ids, missed=subscription.missed)
        self.close_reader(reader)

    def close_reader(self, reader: ReaderHistory) -> None:
        """Record the violations of a reader and add the reader to the summary."""
        for task_id, text in reader.violations:
            self.violate(task_id, text)
        self.readers.append(reader)

    # Methods that start, supervise and check the run.

    def run(self) -> bool:
        """Run, print the summary, and return whether there is no violation."""
        storm_tasks.runs.clear()
        storm_tasks.children.clear()
        Path(os.environ[storm_tasks.RUNS_FILE]).write_text("", encoding="utf-8")
        began = time.monotonic()
        with (
            # Each run has new pools, so the results of earlier runs are released.
            override_settings(TASKS=settings.TASKS),
            hub.recording(self.recorded.append),
        ):
            enqueuers, others = self.start()
            finished_in_time = self.wait(enqueuers)
            self.ids = self.known_ids()
            self.over.set()
            for thread in others:
                thread.join(PATIENCE)
                if thread.is_alive():
                    self.violate("-", f"the thread {thread.name} does not end")
            if not finished_in_time:
                self.violate("-", f"no task finished for {PATIENCE} seconds")
                faulthandler.dump_traceback(all_threads=True)
            seconds = time.monotonic() - began
            self.check()
        self.report(seconds)
        return not self.violations

    def start(self) -> tuple[list[threading.Thread], list[threading.Thread]]:
        """Start all threads; return those that enqueue, and the others."""
        # The two readers of all tasks subscribe before the first task is enqueued, so that they
        # can receive the events of every task.
        self.subscribed = threading.Barrier(3)
        others = [self.start_thread(self.read_everything), self.start_thread(self.run_loop)]
        self.subscribed.wait()
        share, rest = divmod(self.tasks, ENQUEUERS)
        enqueuers = [
            self.start_thread(self.enqueue, self.rng("enqueue", number), share + (number < rest))
            for number in range(ENQUEUERS)
        ]
        others += [
            self.start_thread(action, self.rng(action.__name__, number))
            for action, threads in (
                (self.cancel, CANCELLERS),
                (self.read_in_threads, THREAD_READERS),
            )
            for number in range(threads)
        ]
        return enqueuers, others

    def rng(self, action: str, number: int) -> random.Random:
        """Return the random number generator of one thread or asyncio task, made from the seed."""
        return random.Random(f"{self.seed} {action} {number}")

    def start_thread(self, action: Callable[..., None], *arguments: Any) -> threading.Thread:
        """Start a thread that calls an action; record an exception in the action as a violation."""

        def run() -> None:
            try:
                action(*arguments)
            except BaseException as error:
                self.violate("-", f"{error!r} in {action.__name__}")
                raise

        name = f"storm-{action.__name__}-{next(self.numbers)}"
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def run_loop(self) -> None:
        """Run an event loop with all readers that are asyncio tasks. Called in a thread."""

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                group.create_task(self.aread_everything())
                for number in range(LOOP_READERS):
                    group.create_task(self.read_in_loop(self.rng("loop", number)))

        asyncio.run(main())

    def wait(self, enqueuers: list[threading.Thread]) -> bool:
        """Wait until all tasks are enqueued and finished; False after PATIENCE without progress."""
        self.finished: set[str] = set()
        self.events: dict[str, list[TaskEvent]] = {}
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            enqueuing = any(thread.is_alive() for thread in enqueuers)
            before = len(self.finished)
            self.sort_recorded()
            # known_ids() contains the parent tasks, so at this point none of them can still run
            # and enqueue a child.
            if not enqueuing and self.finished >= self.known_ids():
                return True
            if len(self.finished) > before:
                deadline = time.monotonic() + PATIENCE
            time.sleep(0.02)
        return False

    def sort_recorded(self) -> None:
        """Move the recorded events into `events`, by task, and note which tasks have finished."""
        while self.recorded:
            event = self.recorded.popleft()
            self.events.setdefault(event.id, []).append(event)
            if event.is_last:
                self.finished.add(event.id)

    def known_ids(self) -> set[str]:
        """Return the ids of the tasks that threads or other tasks have enqueued so far."""
        of_threads = {result_id for _, result_id, _ in self.enqueued.copy()}
        return of_threads | {result_id for result_id, _ in storm_tasks.children.copy()}

    def check(self) -> None:
        """Check the history of each task."""
        self.sort_recorded()
        runs = storm_tasks.counted_runs()
        cancelled = set(self.cancel_calls)
        children = [("default", *child) for child in storm_tasks.children]
        tasks = [*self.enqueued, *children]
        evictable = sum(alias == "evicting" for alias, _, _ in tasks) > FEW_RESULTS
        kept = 0
        for alias, result_id, expected in tasks:
            try:
                result = task_backends[alias].get_result(result_id)
            except TaskResultDoesNotExist:
                result = None
            kept += alias == "evicting" and result is not None
            history = History(
                expected=expected,
                events=self.events.pop(result_id, []),
                runs=runs.pop(result_id, 0),
                cancelled=result_id in cancelled,
                result=result,
                snapshot=hub.snapshot(result_id),
                may_be_evicted=alias == "evicting" and evictable,
            )
            for text in wrong_history(history):
                self.violate(result_id, text, history.events)
        if evictable and kept != FEW_RESULTS:
            self.violate("-", f"{kept} results are kept, MAX_RESULTS is {FEW_RESULTS}")
        for result_id, events in self.events.items():
            self.violate(result_id, "events of a task that no thread has enqueued", events)
        for result_id in runs:
            self.violate(result_id, "a run of a task that no thread has enqueued")
        self.cancelled = len(cancelled)
        self.total = len(tasks)

    def report(self, seconds: float) -> None:
        """Print the summary and the first violations."""
        read = sum(len(reader.versions) for reader in self.readers)
        print(
            f"seed {self.seed}: {self.total:,} tasks, {self.cancelled:,} of them cancelled, "
            f"{len(self.readers):,} readers of {read:,} states, {seconds:.1f} s: "
            f"{len(self.violations)} violations",
            flush=True,
        )
        for violation in list(self.violations)[:SHOWN]:
            print(violation)


def main() -> None:
    """Run as often as --runs states, with a new seed each time; exit with 1 after a violation."""
    parser = argparse.ArgumentParser(description="Many tasks of every kind, and a checker.")
    parser.add_argument("--tasks", type=int, default=50_000)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the next has +1")
    parser.add_argument("--processes", action="store_true", help="use worker processes too")
    options = parser.parse_args()
    logging.disable(logging.ERROR)  # The backend would log each failed task with a traceback.
    good = True
    with tempfile.NamedTemporaryFile() as runs_file:
        os.environ[storm_tasks.RUNS_FILE] = runs_file.name
        for number in range(options.runs):
            storm = Storm(options.tasks, options.seed + number, processes=options.processes)
            good &= storm.run()
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
