"""
Run tasks of all kinds in both backends; cancel tasks, kill workers, discard pools, read streams.

    uv run stress/chaos.py [--minutes 10] [--seed 1]

The checker in invariants.py receives a log of all events, signals and return values of cancel().
The program prints figures and each violation; the exit status is 1 if there is a violation. The
seed determines the actions of each thread but not how the threads interleave, so two runs with one
seed differ. The program runs on Linux only.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import logging
import math
import multiprocessing.process
import os
import random
import resource
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import django
from django.conf import settings

if not settings.configured:
    settings.configure(
        SECRET_KEY="only for chaos",
        ALLOWED_HOSTS=["127.0.0.1"],
        ROOT_URLCONF="stress.chaos_urls",
        USE_TZ=True,
        INSTALLED_APPS=["django_eventstream", "django_tasks_local_sse"],
        TASKS={
            "default": {
                "BACKEND": "django_tasks_local.ThreadPoolBackend",
                "OPTIONS": {"MAX_WORKERS": 8, "MAX_RESULTS": 30, "MAX_PENDING": 60},
            },
            "processes": {
                "BACKEND": "django_tasks_local.ProcessPoolBackend",
                "OPTIONS": {
                    "MAX_WORKERS": 3,
                    "MAX_RESULTS": 30,
                    "MAX_PENDING": 60,
                    "TIMEOUT": 1.0,
                    "MAX_TASKS_PER_WORKER": 200,
                },
            },
        },
    )
    django.setup()

from django.tasks import task_backends
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.test import RequestFactory

from benchmarks.common.tables import print_machine, print_table
from django_tasks_local import cancel, pools
from django_tasks_local.exceptions import QueueFull
from django_tasks_local.hub import hub
from django_tasks_local_sse.access import events_url
from stress import chaos_tasks
from stress.invariants import Checker, Violation, version

# Seconds of one round. The checker judges a task invariants.ROUNDS rounds after its end.
ROUND = 2.0
# Seconds to wait at the end of the run until all tasks have finished, and again until the package
# has released its threads, processes and entries of the hub.
PATIENCE = 30.0
RECENT = 60  # Cancellers and readers choose among this number of the newest tasks.
THREAD_READERS, LOOP_READERS, CLIENTS, CANCELLERS = 3, 6, 6, 3
# By quantity, the allowed growth from the median of early readings to that of late readings.
SLACK = {"RSS in MiB": 24, "files": 20, "threads": 16, "children": 6, "tasks of the hub": 150}
# enqueue() may raise RuntimeErrors with these texts: while the pools are discarded, and after many
# worker processes in a row were killed while they started.
REFUSALS = ("is shutting down", "cannot start worker processes")
# Log messages at level ERROR that failing receivers and kills cause, and their names in the report.
EXPECTED_ERRORS = {
    "A receiver failed for task id=%s.": "receivers that raised SystemExit",
    "The task backend %r cannot start worker processes:\n%s": "too many kills in a row",
}
# The number of readings from which growth is checked. A run with fewer readings ends before caches
# and pools have reached their full size.
ENOUGH = 20
OPTIONS = {alias: dict(settings.TASKS[alias]["OPTIONS"]) for alias in settings.TASKS}


class Chaos:
    """Runs the threads of one run and collects their log entries."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.over = threading.Event()
        self.until = math.inf  # The value of time.monotonic() at which the run ends.
        # All threads append to the log without a lock, because append() on a deque is atomic. The
        # main thread passes the entries to the checker.
        self.log: deque[tuple[Any, ...]] = deque()
        self.checker = Checker(chaos_tasks.EXPECTED, chaos_tasks.TIMEOUT)
        self.counts: Counter[str] = Counter()  # Only the main thread uses it.
        # The newest tasks, as pairs of alias and id.
        self.recent: deque[tuple[str, str]] = deque(maxlen=RECENT)
        self.to_cancel: deque[tuple[str, str]] = deque()
        self.old_pools: deque[Any] = deque(maxlen=4)
        self.readings: list[dict[str, float]] = []
        self.pids: set[int] = set()  # The ids of worker processes that have run a task.
        self.numbers = count()
        self.url = ""

    def enter(self, entry: str, *values: Any) -> None:
        """Append an entry to the log; `entry` is a method of Checker. Called from any thread."""
        self.log.append((entry, *values))

    # Methods that observe signals, log messages and uncaught exceptions.

    def observe(self) -> None:
        """Connect receivers to all signals; record error logs and uncaught exceptions."""
        task_enqueued.connect(self.on_enqueued, weak=False)
        task_started.connect(self.on_started, weak=False)
        task_finished.connect(self.on_finished, weak=False)
        for number, task_signal in enumerate((task_enqueued, task_started, task_finished)):
            # Connect the raising receiver last: its SystemExit prevents the call of later ones.
            task_signal.connect(self._raiser(number), weak=False)
        handler = ErrorHandler(self)
        logging.getLogger("django_tasks_local").addHandler(handler)
        logging.getLogger("asyncio").addHandler(handler)
        for name in ("django_tasks_local", "django.tasks", "django.dispatch"):
            logging.getLogger(name).propagate = False
            logging.getLogger(name).addHandler(logging.NullHandler())
        threading.excepthook = lambda args: self.violate(f"{args.exc_value!r} in a thread")
        sys.unraisablehook = lambda args: self.violate(f"{args.exc_value!r} in a finalizer")

    def on_enqueued(self, sender: type, task_result: Any, **kwargs: Any) -> None:
        """Log that task_enqueued was sent. Called in the thread that enqueues the task."""
        self.enter("signalled", "enqueued", task_result.id)

    def on_started(self, sender: type, task_result: Any, **kwargs: Any) -> None:
        """Log that task_started was sent. Called in a worker thread or the dispatcher's thread."""
        self.enter("signalled", "started", task_result.id)

    def on_finished(self, sender: type, task_result: Any, **kwargs: Any) -> None:
        """Log the result in task_finished and the stored result. Called as on_started() is."""
        stored = self.stored(task_result.backend, task_result.id)
        if task_result.backend == "processes":
            self.pids.update(map(process_id, task_result.worker_ids))
        self.enter("signalled", "finished", task_result.id, task_result, stored)

    def stored(self, alias: str, task_id: str) -> Any:
        """Return the stored result from the current pools or from one discarded recently."""
        for pool in self.pools:
            with contextlib.suppress(TaskResultDoesNotExist):
                return pool.results.get(task_id).task_result()
        return None

    def _raiser(self, number: int) -> Callable[..., None]:
        rng = random.Random(f"{self.seed} receiver {number}")

        def receiver(sender: type, task_result: Any, **kwargs: Any) -> None:
            luck = rng.random()
            if luck < 0.05:
                raise ValueError("an error in a receiver")
            # The receiver of task_enqueued (number 0) raises no SystemExit, because send_robust()
            # would let it propagate out of enqueue().
            if luck < 0.06 and number:
                raise SystemExit("a receiver that exits")

        return receiver

    def violate(self, what: str) -> None:
        """Log a violation that belongs to no single task. Called from any thread."""
        self.enter("violate", "-", what)

    # Actions. start() calls each of them repeatedly in a thread of its own.

    def enqueue(self, rng: random.Random, alias: str) -> None:
        """Enqueue up to 40 random tasks in one backend, then pause."""
        choices = chaos_tasks.IN_PROCESSES if alias == "processes" else chaos_tasks.ANYWHERE
        weights = [weight for weight, _, _ in choices]
        for _, task, arguments in rng.choices(choices, weights, k=rng.randint(1, 40)):
            try:
                result = task.using(backend=alias).enqueue(*arguments(rng))
            except QueueFull:
                self.enter("count", "QueueFull")
                self.over.wait(rng.uniform(0, 0.02))
            except RuntimeError as error:
                known = [why for why in REFUSALS if why in str(error)]
                if not known:
                    raise
                self.enter("count", f"refused: the backend {known[0]}")
                self.over.wait(0.1)
            else:
                self.enter("count", f"enqueued in {alias}")
                self.recent.append((alias, result.id))
                if task in chaos_tasks.TO_BE_CANCELLED:
                    self.to_cancel.append((alias, result.id))
        # One pause in fifty lasts up to 6 seconds, so that the workers become idle.
        self.over.wait(rng.uniform(0, 6 if rng.random() < 0.02 else 0.05))

    def cancel(self, rng: random.Random) -> None:
        """Cancel a task that never returns, and a recent task, which may have finished."""
        self.over.wait(rng.uniform(0, 0.1))
        with contextlib.suppress(IndexError):
            self.cancel_one(*(self.to_cancel.popleft()))
        if self.recent:
            self.cancel_one(*rng.choice(self.recent))

    def cancel_one(self, alias: str, task_id: str) -> None:
        """Cancel a task and read its stored result directly after that."""
        try:
            cancelled = cancel(task_id, backend=alias)
        except TaskResultDoesNotExist:
            self.enter("missing", task_id)
            return
        self.enter("count", f"cancel() was {cancelled}")
        stored = self.stored(alias, task_id)
        self.enter("answered", task_id, cancelled, stored is None or stored.is_finished)

    def kill(self, rng: random.Random) -> None:
        """Kill one worker process, busy or idle, or rarely all of them."""
        self.over.wait(rng.uniform(0, 2))
        found = worker_processes()
        if rng.random() < 0.9:
            # Workers that have run no task yet may still be starting. They are spared in 9 of 10
            # passes, because the backend gives up after several that do not start in a row.
            found = [process for process in found if process.pid in self.pids]
        for process in found if rng.random() < 0.05 else rng.sample(found, min(1, len(found))):
            number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
            state = "has" if process.pid in self.pids else "has not"
            self.enter("killed", process.pid)
            self.enter("count", f"kill -{number} of a worker that {state} run a task")
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def discard(self, rng: random.Random) -> None:
        """Replace the pools by new ones, as a test does that changes TASKS."""
        if not self.over.wait(rng.uniform(10, 40)):
            self.discard_now()

    def discard_now(self) -> None:
        """Discard the pools of all backends, and keep the pools to read their results later."""
        self.enter("closing")
        self.enter("count", "pools discarded")
        self.old_pools.extend(pools.all_pools())
        pools.discard_all()
        self.enter("closing")

    @property
    def pools(self) -> list[Any]:
        """Return the current pools and the last four that were discarded."""
        return [*pools.all_pools(), *self.old_pools]

    # Methods that read events, in threads, in an event loop and over HTTP.

    def at_most(self, seconds: float) -> float:
        """Return `seconds`, or the seconds until the end of the run if they are fewer."""
        return max(0.0, min(seconds, self.until - time.monotonic()))

    def ids(self, rng: random.Random) -> list[str]:
        """Return the ids of some recent tasks; an empty list subscribes to all tasks."""
        recent = list(self.recent)
        if not recent or rng.random() < 0.2:
            return []
        return list({task_id for _, task_id in rng.choices(recent, k=rng.randint(1, 5))})

    def log_read(self, reader: str, events: list[Any]) -> None:
        """Log the events that a reader received; compare final events with the stored results."""
        for event in events:
            self.enter("count", "events read")
            self.enter("read", reader, event.id, event.version, event.is_last)
            stored = self.stored(event.backend, event.id) if event.is_last else None
            if stored is not None and stored.status != event.status:
                self.violate(
                    f"{event.id}: a reader saw {event.status}, the store had {stored.status}"
                )

    def read_in_thread(self, rng: random.Random) -> None:
        """Read for some seconds with random pauses; 7 of 10 readers finally take all that is left.

        Only these must have received the last event of each task that ended long ago.
        """
        reader = f"thread-{next(self.numbers)}"
        deadline = min(self.until, time.monotonic() + rng.uniform(0, 6))
        with hub.subscribe(*self.ids(rng)) as subscription:
            while not subscription.ended and time.monotonic() < deadline:
                self.log_read(reader, subscription.take(rng.choice((0, 0.1, 1))))
                if rng.random() < 0.1:
                    self.over.wait(rng.uniform(0, 3))  # The reader takes no events for a while.
            complete = rng.random() < 0.7
            if complete:
                self.log_read(reader, subscription.take(0))
        self.enter("left", reader, complete and not subscription.missed)
        self.enter("count", "readers in threads")

    async def read_in_loop(self, rng: random.Random) -> None:
        """Do the same as read_in_thread() in an asyncio task."""
        reader = f"loop-{next(self.numbers)}"
        deadline = min(self.until, time.monotonic() + rng.uniform(0, 6))
        async with hub.subscribe(*self.ids(rng)) as subscription:
            while not subscription.ended and time.monotonic() < deadline:
                self.log_read(reader, await subscription.atake(rng.choice((0, 0.1, 1))))
                if rng.random() < 0.1:
                    await asyncio.sleep(self.at_most(rng.uniform(0, 3)))
                await asyncio.sleep(0)
            complete = rng.random() < 0.7
            if complete:
                self.log_read(reader, await subscription.atake(0))
        self.enter("left", reader, complete and not subscription.missed)
        self.enter("count", "readers in an event loop")

    async def read_over_http(self, rng: random.Random) -> None:
        """Read a stream of up to three tasks from the server, until it ends or for up to 4 s."""
        results = [
            stored
            for alias, task_id in rng.sample(list(self.recent), min(3, len(self.recent)))
            if (stored := self.stored(alias, task_id)) is not None
        ]
        if not results:
            await asyncio.sleep(0.1)
            return
        reader = f"client-{next(self.numbers)}"
        ended = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.at_most(rng.uniform(0, 4))):
                await self.follow(reader, events_url(RequestFactory().get("/"), *results))
                ended = True
        self.enter("left", reader, ended)
        self.enter("count", "clients that received the end" if ended else "clients that left early")

    async def follow(self, reader: str, path: str) -> None:
        """Read one stream to its end."""
        host, port = self.url.split(":")
        incoming, outgoing = await asyncio.open_connection(host, int(port))
        try:
            outgoing.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            while line := await incoming.readline():
                if line.startswith(b"data: "):
                    self.log_payload(reader, json.loads(line.removeprefix(b"data: ")))
        finally:
            outgoing.close()

    def log_payload(self, reader: str, payload: dict[str, Any]) -> None:
        """Log an event that a client received over HTTP."""
        self.enter("count", "events over HTTP")
        kind = payload["kind"]
        seen = (
            (math.inf, 0)
            if kind == "unknown"
            else version(payload["sequence"], payload["position"])
        )
        self.enter("read", reader, payload["id"], seen, kind in {"unknown", "finished"})

    # Methods that start, supervise and end the run.

    def run(self, seconds: float) -> None:
        """Run all actions for `seconds`, end them, and let the checker judge all tasks.

        Called in the main thread.
        """
        self.until = time.monotonic() + seconds
        self.observe()
        server, server_thread = self.serve()
        threads = [self.start(self.enqueue, alias) for alias in OPTIONS]
        threads += [self.start(self.cancel) for _ in range(CANCELLERS)]
        threads += [self.start(self.kill), self.start(self.discard)]
        threads += [self.start(self.read_in_thread) for _ in range(THREAD_READERS)]
        threads.append(self.start_loop(self.read_in_loop, LOOP_READERS))
        threads.append(self.start_loop(self.read_over_http, CLIENTS))
        self.watch()
        self.over.set()
        for thread in threads:
            thread.join(PATIENCE)
            if thread.is_alive():
                self.violate(f"the thread {thread.name} hangs")
        self.finish_all()
        server.should_exit = True
        server_thread.join(PATIENCE)
        # check_end() waits until no pool runs, so that the log contains all entries about tasks.
        self.check_end()
        self.drain_log()
        self.checker.end()

    def serve(self) -> tuple[Any, threading.Thread]:
        """Start a real uvicorn in a thread of this process."""
        import uvicorn
        from django.core.asgi import get_asgi_application

        config = uvicorn.Config(
            get_asgi_application(), port=0, log_level="error", lifespan="off", access_log=False
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, name="chaos-server", daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        self.url = "{}:{}".format(*server.servers[0].sockets[0].getsockname()[:2])
        return server, thread

    def start(self, action: Callable[..., None], *arguments: Any) -> threading.Thread:
        """Start a thread that calls an action repeatedly until the run is over."""
        number = next(self.numbers)
        rng = random.Random(f"{self.seed} {action.__name__} {number}")

        def run() -> None:
            while not self.over.is_set():
                action(rng, *arguments)

        thread = threading.Thread(target=run, name=f"chaos-{action.__name__}-{number}", daemon=True)
        thread.start()
        return thread

    def start_loop(self, action: Callable[..., Any], times: int) -> threading.Thread:
        """Start a thread with an event loop in which `times` asyncio tasks repeat an action."""

        async def repeat(rng: random.Random) -> None:
            while not self.over.is_set():
                await action(rng)

        async def main() -> None:
            async with asyncio.TaskGroup() as group:
                for number in range(times):
                    rng = random.Random(f"{self.seed} {action.__name__} {number}")
                    group.create_task(repeat(rng))

        thread = threading.Thread(
            target=asyncio.run, args=(main(),), name=f"chaos-{action.__name__}", daemon=True
        )
        thread.start()
        return thread

    def watch(self) -> None:
        """Pass the log to the checker and take readings until the end of the run."""
        next_round = time.monotonic() + ROUND
        while (now := time.monotonic()) < self.until:
            time.sleep(0.1)
            self.drain_log()
            if now >= next_round:
                next_round = now + ROUND
                self.checker.end_round()
                self.readings.append(self.reading())

    def drain_log(self) -> None:
        """Pass the new log entries to the checker, and count those of the kind `count`."""
        while self.log:
            what, *values = self.log.popleft()
            if what == "count":
                self.counts[values[0]] += 1
            else:
                self.counts["events"] += what == "published"
                getattr(self.checker, what)(*values)

    def reading(self) -> dict[str, float]:
        """Return the sizes that must stay bounded; check that MAX_PENDING is observed."""
        for alias, options in OPTIONS.items():
            statistics = task_backends[alias].statistics()
            unfinished = statistics.waiting + statistics.running
            if unfinished > options["MAX_PENDING"] + options["MAX_WORKERS"]:
                self.violate(f"{unfinished} unfinished tasks in {alias}: MAX_PENDING is exceeded")
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
        return {
            "RSS in MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - only the number is used
            "threads": threading.active_count(),
            "children": len(worker_processes()),
            "tasks of the hub": hub.statistics().events,
        }

    def finish_all(self) -> None:
        """Wait until all tasks finish, cancel those that never return, and discard the pools."""
        deadline = time.monotonic() + PATIENCE
        while (
            any(pool.statistics().unfinished for pool in self.pools) and time.monotonic() < deadline
        ):
            with contextlib.suppress(IndexError):
                self.cancel_one(*self.to_cancel.popleft())
            time.sleep(0.01)
            self.drain_log()
        for pool in self.pools:
            for record in pool.wait_until_idle(timeout=0):
                self.enter("violate", record.id, f"it did not finish in {PATIENCE} seconds")
        # Discard the pools once more while tasks run and wait, because the run ends with that.
        rng = random.Random(f"{self.seed} end")
        for alias in OPTIONS:
            for _ in range(30):
                with contextlib.suppress(QueueFull):
                    chaos_tasks.nap.using(backend=alias).enqueue(rng.uniform(0, 0.3))
        self.discard_now()

    def check_end(self) -> None:
        """Check that no thread, process or hub entry of the package is left, and none has grown."""
        deadline = time.monotonic() + PATIENCE
        while (left := self.left_over()) and time.monotonic() < deadline:
            time.sleep(0.05)
        for what in left:
            self.checker.violate("-", f"left at the end: {what}")
        for what, slack in SLACK.items() if len(self.readings) >= ENOUGH else ():
            first, last = self.first_and_last(what)
            if last > first + slack:
                self.checker.violate("-", f"{what} grew from {first:.0f} to {last:.0f}")

    def left_over(self) -> list[str]:
        """Return the threads, processes and hub entries that the package should have released."""
        threads = [
            thread.name
            for thread in threading.enumerate()
            if thread.name.startswith("django-tasks-") and thread.name != "django-tasks-progress"
        ]
        hubs = dataclasses.asdict(hub.statistics())
        names = [process.name for process in worker_processes()]
        workers = [name for name in names if name.startswith("django-tasks-")]
        return (
            threads
            + workers
            + [f"{count} {name} of the hub" for name, count in hubs.items() if count]
        )

    def first_and_last(self, what: str) -> tuple[float, float]:
        """Return the medians of the second fifth and of the last fifth of the readings."""
        values = [reading[what] for reading in self.readings]
        part = max(1, len(values) // 5)
        return median(values[part : 2 * part] or [0]), median(values[-part:] or [0])

    def report(self, seconds: float) -> bool:
        """Print the figures and the violations; return whether there are none."""
        print_machine(f"Seed {self.seed}, {seconds:.0f} seconds.")
        tasks = sum(self.checker.outcomes.values())
        outcomes = [(f"... {end}", n) for end, n in self.checker.outcomes.most_common()]
        rows = [("tasks judged", tasks), *outcomes, *sorted(self.counts.items())]
        print_table(("what", "how many"), [(name, f"{number:,}") for name, number in rows])
        measured = [(what, *self.first_and_last(what)) for what in SLACK]
        most = (
            {what: max(r[what] for r in self.readings) for what in SLACK} if self.readings else {}
        )
        print_table(
            ("bounded", "after warming up", "at the end", "most"),
            [(w, f"{a:.0f}", f"{b:.0f}", f"{most.get(w, 0):.0f}") for w, a, b in measured],
        )
        violations: list[Violation] = self.checker.violations
        for violation in violations[:50]:
            print(violation)
        print(f"violations: {len(violations)}")
        return not violations


class ErrorHandler(logging.Handler):
    """Records log messages of this package as violations, except those in EXPECTED_ERRORS."""

    def __init__(self, chaos: Chaos) -> None:
        super().__init__(logging.ERROR)
        self._chaos = chaos

    def emit(self, record: logging.LogRecord) -> None:
        """Log a violation, or count an expected error. Called from any thread."""
        if record.msg in EXPECTED_ERRORS:
            self._chaos.enter("count", EXPECTED_ERRORS[record.msg])
        else:
            self._chaos.violate(self.format(record))


def worker_processes() -> list[Any]:
    """Return the worker processes, without reaping dead ones as active_children() would."""
    return list(multiprocessing.process._children.copy())


def process_id(worker_id: str) -> int:
    """Return the process id of a worker, which follows the `@` in its worker id."""
    return int(worker_id.rpartition("@")[2])


def main() -> None:
    """Run once with the options of the command line; exit with 1 after a violation."""
    parser = argparse.ArgumentParser(description="All kinds of tasks and disturbances.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed: {arguments.seed}", flush=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    chaos = Chaos(arguments.seed)
    with hub.recording(lambda event: chaos.enter("published", event)):
        chaos.run(arguments.minutes * 60)
    if not chaos.report(arguments.minutes * 60):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
