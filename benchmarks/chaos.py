"""
Chaos: tasks of all kinds in both backends, while others cancel, kill, close, read and disturb.

    uv run benchmarks/chaos.py [--minutes 10] [--seed 1]

Everything that happens is told to the checker in invariants.py. Prints figures and each violation,
and exits with 1 if there is one. A seed decides what each thread does, but not how the threads
interleave: two runs with one seed are alike, and not the same. Linux only.
"""

import argparse
import asyncio
import contextlib
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
        ROOT_URLCONF="chaos_urls",
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

import chaos_tasks
from django.tasks import task_backends
from django.tasks.exceptions import TaskResultDoesNotExist
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.test import RequestFactory
from invariants import Checker, Violation, version

from django_tasks_local import cancel, pools
from django_tasks_local.exceptions import QueueFull
from django_tasks_local.hub import hub
from django_tasks_local.results import ResultStore
from django_tasks_local_sse.access import events_url

ROUND = 2.0  # seconds; see invariants.ROUNDS
PATIENCE = 30.0  # seconds in which all that was enqueued must finish
RECENT = 60  # tasks of which cancellers and readers choose
THREAD_READERS, LOOP_READERS, CLIENTS, CANCELLERS = 3, 6, 6, 3
# What may grow between the first readings and the last ones.
SLACK = {"RSS in MiB": 24, "files": 20, "threads": 16, "children": 6, "cells of the hub": 150}
# Why enqueue() may raise RuntimeError: the second after many kills in a row.
REFUSALS = ("is shutting down", "cannot start worker processes")
# Errors in the log that are the doing of receivers, and of kills.
NOT_OURS = {
    "A receiver failed for task id=%s.": "receivers that raised SystemExit",
    "The task backend %r cannot start worker processes:\n%s": "too many kills in a row",
}
ENOUGH = 20  # readings; in a shorter run everything still warms up
OPTIONS = {alias: dict(settings.TASKS[alias]["OPTIONS"]) for alias in settings.TASKS}


class Chaos:
    """All that goes on, and the log of it. Methods say in which thread they run."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.over = threading.Event()
        self.until = math.inf  # time.monotonic(), when it is over
        # Appended to by all threads, which is atomic, and told to the checker by the main one.
        self.log: deque[tuple[Any, ...]] = deque()
        self.checker = Checker(chaos_tasks.EXPECTED, chaos_tasks.TIMEOUT)
        self.counts: Counter[str] = Counter()  # of the main thread, while it reads the log
        self.recent: deque[tuple[str, str]] = deque(maxlen=RECENT)  # alias, id
        self.to_cancel: deque[tuple[str, str]] = deque()
        self.old_pools: deque[Any] = deque(maxlen=4)
        self.readings: list[dict[str, float]] = []
        self.numbers = count()
        self.url = ""

    def tell(self, what: str, *values: Any) -> None:
        """Append to the log. Called from any thread."""
        self.log.append((what, *values))

    # What is heard of everything

    def listen(self) -> None:
        """Hear every signal, and every error of ours."""
        task_enqueued.connect(self.on_enqueued, weak=False)
        task_started.connect(self.on_started, weak=False)
        task_finished.connect(self.on_finished, weak=False)
        for number, task_signal in enumerate((task_enqueued, task_started, task_finished)):
            # Behind the others, because SystemExit keeps those from being called.
            task_signal.connect(self._raiser(number), weak=False)
        ResultStore.settle = self._counting(ResultStore.settle)
        handler = Listener(self)
        logging.getLogger("django_tasks_local").addHandler(handler)
        logging.getLogger("asyncio").addHandler(handler)
        for name in ("django_tasks_local", "django.tasks", "django.dispatch"):
            logging.getLogger(name).propagate = False
            logging.getLogger(name).addHandler(logging.NullHandler())
        threading.excepthook = lambda arguments: self.oops(f"{arguments.exc_value!r} in a thread")
        sys.unraisablehook = lambda arguments: self.oops(f"{arguments.exc_value!r} in a finalizer")

    def _counting(self, settle: Callable[..., list[str]]) -> Callable[..., list[str]]:
        def counting(store: ResultStore, result_id: str) -> list[str]:
            evicted = settle(store, result_id)
            for _ in evicted:
                self.tell("count", "results evicted")
            return evicted

        return counting

    def on_enqueued(self, sender: type, task_result: Any, **kwargs: Any) -> None:
        """Called where the task is enqueued."""
        self.tell("signalled", "enqueued", task_result.id)

    def on_started(self, sender: type, task_result: Any, **kwargs: Any) -> None:
        """Called in the worker's thread, or in the dispatcher's."""
        self.tell("signalled", "started", task_result.id)

    def on_finished(self, sender: type, task_result: Any, **kwargs: Any) -> None:
        """See on_started()."""
        stored = self.stored(task_result.backend, task_result.id)
        self.tell("signalled", "finished", task_result.id, task_result, stored)

    def stored(self, alias: str, task_id: str) -> Any:
        """Return what the stores say: the pool may be one that was discarded just now."""
        for pool in self.pools:
            with contextlib.suppress(TaskResultDoesNotExist):
                return pool.results.get(task_id)
        return None

    def _raiser(self, number: int) -> Callable[..., None]:
        rng = random.Random(f"{self.seed} receiver {number}")

        def receiver(sender: type, task_result: Any, **kwargs: Any) -> None:
            luck = rng.random()
            if luck < 0.05:
                raise ValueError("a receiver without luck")
            # Out of task_enqueued it comes out of enqueue(), as of any send_robust().
            if luck < 0.06 and number:
                raise SystemExit("a receiver that wants to leave")

        return receiver

    def oops(self, what: str) -> None:
        """Something of ours went wrong. Called from any thread."""
        self.tell("violate", "-", what)

    # What is done; each of these runs in a thread of its own, again and again

    def enqueue(self, rng: random.Random, alias: str) -> None:
        """Enqueue some tasks of one backend."""
        choices = chaos_tasks.IN_PROCESSES if alias == "processes" else chaos_tasks.ANYWHERE
        weights = [weight for weight, _, _ in choices]
        for _, task, arguments in rng.choices(choices, weights, k=rng.randint(1, 40)):
            try:
                result = task.using(backend=alias).enqueue(*arguments(rng))
            except QueueFull:
                self.tell("count", "QueueFull")
                self.over.wait(rng.uniform(0, 0.02))
            except RuntimeError as error:
                known = [why for why in REFUSALS if why in str(error)]
                if not known:
                    raise
                self.tell("count", f"refused: the backend {known[0]}")
                self.over.wait(0.1)
            else:
                self.tell("count", f"enqueued in {alias}")
                self.recent.append((alias, result.id))
                if task in chaos_tasks.TO_BE_CANCELLED:
                    self.to_cancel.append((alias, result.id))
        # Now and then so long that the workers become idle.
        self.over.wait(rng.uniform(0, 6 if rng.random() < 0.02 else 0.05))

    def cancel(self, rng: random.Random) -> None:
        """Cancel a task that was enqueued lately, finished or not, or one that needs it."""
        self.over.wait(rng.uniform(0, 0.1))
        with contextlib.suppress(IndexError):
            self.cancel_one(*(self.to_cancel.popleft()))
        if self.recent:
            self.cancel_one(*rng.choice(self.recent))

    def cancel_one(self, alias: str, task_id: str) -> None:
        """Cancel, and look what the store says then."""
        try:
            cancelled = cancel(task_id, backend=alias)
        except TaskResultDoesNotExist:
            self.tell("missing", task_id)
            return
        self.tell("count", f"cancel() was {cancelled}")
        stored = self.stored(alias, task_id)
        self.tell("answered", task_id, cancelled, stored is None or stored.is_finished)

    def kill(self, rng: random.Random) -> None:
        """Kill a worker process, busy or idle, or now and then all of them."""
        self.over.wait(rng.uniform(0, 2))
        dispatcher = task_backends["processes"]._pool._dispatcher
        with contextlib.suppress(RuntimeError):  # The set has changed in the meantime.
            found = [] if dispatcher is None else list(dispatcher._workers)
            if rng.random() < 0.9:
                # One that starts is killed now and then only, or there would never be another.
                found = [worker for worker in found if worker.was_ready]
            for worker in found if rng.random() < 0.05 else rng.sample(found, min(1, len(found))):
                pid = int(worker.worker_id.rpartition("@")[2])
                number = rng.choice((signal.SIGKILL, signal.SIGKILL, signal.SIGTERM))
                self.tell("killed", pid)
                self.tell("count", f"kill -{number} of a worker that was {worker.state.value}")
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)

    def discard(self, rng: random.Random) -> None:
        """Close the pools at once, and begin with new ones, as a test does that changes TASKS."""
        if not self.over.wait(rng.uniform(10, 40)):
            self.discard_now()

    def discard_now(self) -> None:
        """See discard()."""
        self.tell("closing")
        self.tell("count", "pools discarded")
        self.old_pools.extend(pools._pools.values())
        pools._on_setting_changed(setting="TASKS")
        self.tell("closing")

    @property
    def pools(self) -> list[Any]:
        """The pools there are, and were lately."""
        return [*pools._pools.values(), *self.old_pools]

    # Who reads

    def at_most(self, seconds: float) -> float:
        """Return so many seconds, or what is left of them."""
        return max(0.0, min(seconds, self.until - time.monotonic()))

    def ids(self, rng: random.Random) -> list[str]:
        """Return some tasks to read, or none, which means all."""
        recent = list(self.recent)
        if not recent or rng.random() < 0.2:
            return []
        return list({task_id for _, task_id in rng.choices(recent, k=rng.randint(1, 5))})

    def tell_read(self, reader: str, events: list[Any]) -> None:
        """Tell the checker what a reader was given, and see that the store knows of the ends."""
        for event in events:
            self.tell("count", "events read")
            seen = version(event.sequence, event.position)
            self.tell("read", reader, event.id, seen, event.is_last)
            stored = self.stored(event.backend, event.id) if event.is_last else None
            if stored is not None and stored.status != event.status:
                self.oops(f"{event.id}: a reader saw {event.status}, the store {stored.status}")

    def read_in_thread(self, rng: random.Random) -> None:
        """Read for a while, stall now and then, leave early or with everything."""
        reader = f"thread-{next(self.numbers)}"
        deadline = min(self.until, time.monotonic() + rng.uniform(0, 6))
        with hub.subscribe(*self.ids(rng)) as subscription:
            while not subscription.ended and time.monotonic() < deadline:
                self.tell_read(reader, subscription.take(rng.choice((0, 0.1, 1))))
                if rng.random() < 0.1:
                    self.over.wait(rng.uniform(0, 3))  # stalled
            complete = rng.random() < 0.7
            if complete:
                self.tell_read(reader, subscription.take(0))
        self.tell("left", reader, complete and not subscription.missed)
        self.tell("count", "readers in threads")

    async def read_in_loop(self, rng: random.Random) -> None:
        """See read_in_thread()."""
        reader = f"loop-{next(self.numbers)}"
        deadline = min(self.until, time.monotonic() + rng.uniform(0, 6))
        async with hub.subscribe(*self.ids(rng)) as subscription:
            while not subscription.ended and time.monotonic() < deadline:
                self.tell_read(reader, await subscription.atake(rng.choice((0, 0.1, 1))))
                if rng.random() < 0.1:
                    await asyncio.sleep(self.at_most(rng.uniform(0, 3)))
                await asyncio.sleep(0)
            complete = rng.random() < 0.7
            if complete:
                self.tell_read(reader, await subscription.atake(0))
        self.tell("left", reader, complete and not subscription.missed)
        self.tell("count", "readers in an event loop")

    async def read_over_http(self, rng: random.Random) -> None:
        """Be a browser: read a stream of server-sent events, to its end or not."""
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
        self.tell("left", reader, ended)
        self.tell("count", "clients that were told the end" if ended else "clients that left early")

    async def follow(self, reader: str, path: str) -> None:
        """Read one stream to its end."""
        host, port = self.url.split(":")
        incoming, outgoing = await asyncio.open_connection(host, int(port))
        try:
            outgoing.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode())
            while line := await incoming.readline():
                if line.startswith(b"data: "):
                    self.tell_payload(reader, json.loads(line.removeprefix(b"data: ")))
        finally:
            outgoing.close()

    def tell_payload(self, reader: str, payload: dict[str, Any]) -> None:
        """See tell_read()."""
        self.tell("count", "events over HTTP")
        kind = payload["kind"]
        seen = (
            (math.inf, 0)
            if kind == "unknown"
            else version(payload["sequence"], payload["position"])
        )
        self.tell("read", reader, payload["id"], seen, kind in {"unknown", "finished"})

    # The whole

    def run(self, seconds: float) -> None:
        """Let all of it happen for so long, then end it in good order. Runs in the main thread."""
        self.until = time.monotonic() + seconds
        self.listen()
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
                self.oops(f"the thread {thread.name} hangs")
        self.finish_all()
        server.should_exit = True
        server_thread.join(PATIENCE)
        self.check_end()  # Whoever has had a task has told what became of it.
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
        """Do this again and again, in a thread."""
        number = next(self.numbers)
        rng = random.Random(f"{self.seed} {action.__name__} {number}")

        def run() -> None:
            while not self.over.is_set():
                action(rng, *arguments)

        thread = threading.Thread(target=run, name=f"chaos-{action.__name__}-{number}", daemon=True)
        thread.start()
        return thread

    def start_loop(self, action: Callable[..., Any], times: int) -> threading.Thread:
        """Do this again and again, so many times at once, in an event loop of a thread."""

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
        """Read the log, and how much of everything there is."""
        next_round = time.monotonic() + ROUND
        while (now := time.monotonic()) < self.until:
            time.sleep(0.1)
            self.drain_log()
            if now >= next_round:
                next_round = now + ROUND
                self.checker.end_round()
                self.readings.append(self.reading())

    def drain_log(self) -> None:
        """Tell the checker what has happened since the last time."""
        while self.log:
            what, *values = self.log.popleft()
            if what == "count":
                self.counts[values[0]] += 1
            else:
                self.counts["events"] += what == "published"
                getattr(self.checker, what)(*values)

    def reading(self) -> dict[str, float]:
        """Return how much there is of what must stay bounded."""
        for alias, options in OPTIONS.items():
            unfinished = len(task_backends[alias]._pool.results._unfinished)
            if unfinished > options["MAX_PENDING"] + options["MAX_WORKERS"]:
                self.oops(f"{unfinished} unfinished tasks in {alias}: MAX_PENDING does not hold")
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return {
            "RSS in MiB": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
            "files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208 - it is counted at once
            "threads": threading.active_count(),
            "children": len(children()),
            "cells of the hub": len(hub._cells),
        }

    def finish_all(self) -> None:
        """Let what is enqueued finish, and cancel what would not by itself."""
        deadline = time.monotonic() + PATIENCE
        while any(pool._jobs for pool in self.pools) and time.monotonic() < deadline:
            with contextlib.suppress(IndexError):
                self.cancel_one(*self.to_cancel.popleft())
            time.sleep(0.01)
            self.drain_log()
        for pool in self.pools:
            for task_id in list(pool._jobs):
                self.tell("violate", task_id, f"it did not finish in {PATIENCE} seconds")
        # One more time, with tasks that run and wait.
        rng = random.Random(f"{self.seed} end")
        for alias in OPTIONS:
            for _ in range(30):
                with contextlib.suppress(QueueFull):
                    chaos_tasks.nap.using(backend=alias).enqueue(rng.uniform(0, 0.3))
        self.discard_now()

    def check_end(self) -> None:
        """See that nothing is left of what is over."""
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
        """Return what should not be there any more."""
        threads = [
            thread.name
            for thread in threading.enumerate()
            if thread.name.startswith("django-tasks-") and thread.name != "django-tasks-progress"
        ]
        hubs = {"cells": hub._cells, "channels": hub._channels, "readers": hub.everything}
        workers = [name for name in children() if name.startswith("django-tasks-")]
        return (
            threads + workers + [f"{len(of)} {name} of the hub" for name, of in hubs.items() if of]
        )

    def first_and_last(self, what: str) -> tuple[float, float]:
        """Return what was measured after warming up, and at the end."""
        values = [reading[what] for reading in self.readings]
        part = max(1, len(values) // 5)
        return median(values[part : 2 * part] or [0]), median(values[-part:] or [0])

    def report(self, seconds: float) -> bool:
        """Print the figures and the violations; return whether there are none."""
        from tables import print_machine, print_table

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


class Listener(logging.Handler):
    """Hears of errors that are ours: what receivers and tasks raise is not."""

    def __init__(self, chaos: Chaos) -> None:
        super().__init__(logging.ERROR)
        self._chaos = chaos

    def emit(self, record: logging.LogRecord) -> None:
        """Called from any thread."""
        if record.msg in NOT_OURS:
            self._chaos.tell("count", NOT_OURS[record.msg])
        else:
            self._chaos.oops(self.format(record))


def children() -> list[str]:
    """Return the names of the worker processes. Not active_children(), which looks after them."""
    return [process.name for process in multiprocessing.process._children.copy()]


def main() -> None:
    """Run."""
    parser = argparse.ArgumentParser(description="Chaos in both backends, and a checker.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=random.randrange(10**6))
    arguments = parser.parse_args()
    print(f"seed: {arguments.seed}", flush=True)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    chaos = Chaos(arguments.seed)
    with hub.recording(lambda event: chaos.tell("published", event)):
        chaos.run(arguments.minutes * 60)
    if not chaos.report(arguments.minutes * 60):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
