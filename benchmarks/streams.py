"""
What open streams cost: this package's view beside its peers. See docs/performance.md.

    uv run benchmarks/streams.py [--rounds 5] [--connections 1 100 1000 5000]
    uv run benchmarks/streams.py --churn [--readers 1000] [--seconds 30] [--seed 1]

Every measurement has a server (uvicorn) and the clients in a process of their own each, and the
rounds are interleaved (A B C D, A B C D, ...), because a machine is not equally fast at all times.

With --churn it measures nothing, but looks whether each of many readers, some of which stall or
come and go, has the final state in the end, and whether the server's memory stays flat; the exit
code is 1 if not. Linux only.
"""

import argparse
import asyncio
import json
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory
from typing import Any, Self

import django
from stream_churn import Reader, churn
from tables import median_ratio, print_machine, print_table, print_verdict

SIDES = {
    "ours": "this package",
    "eventstream": "django-eventstream's view",
    "plain": "plain Django async view",
    "bare": "bare ASGI",
}
CONNECTIONS = (1, 100, 1000, 5000)
WARM_UP = 50  # connections that come and go before a measurement
EVENTS = 20  # delivered one at a time
BACK_TO_BACK = 40_000  # messages in all, of events published back to back
REPORTS = 100
REPORT_PAUSE = 0.06  # seconds: more than PROGRESS_INTERVAL, so that no report is held back
TASKS = 10  # that the readers of --churn watch
PATIENCE = 20.0  # seconds for the server to close what its readers have left
POLLING = 500.0  # ms between two requests of celery-progress

JUDGED = 1000  # the number of connections that the budgets are about
THREAD_BUDGET = 5
MEMORY_BUDGET = 60.0  # KiB for a connection
DELIVERY_BUDGET = 1.3  # times bare ASGI
REPORT_BUDGET = 2.0  # times bare ASGI
CHURN_BUDGET = 2.0  # MiB


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What one side did with so many connections, once. Times are in ms."""

    threads: int
    more_threads: int
    kibibytes: float  # for each connection
    databases: int
    p50: float
    p99: float
    p50_asyncio: float
    cpu: float  # µs of the server for each event and client
    rate: float  # events received in a second, by all clients together
    lost: float  # share of the events that no client saw


# By side and number of connections, round by round.
type Measured = dict[tuple[str, int], list[Measurement]]


class Program:
    """A program of this benchmark that takes commands."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name(script)), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self) -> Any:
        """Read a line that the program has printed."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, command: str, *arguments: object) -> Any:
        """Give a command and return its answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()
        return self.answer()


class Server(Program):
    """The server of one side."""

    def __init__(self, side: str, database: Path) -> None:
        super().__init__("stream_side.py", side)
        self.database = str(database)
        self.port, self.path = self.answer()
        self.proc = Path("/proc") / str(self.process.pid)

    def kibibytes(self) -> float:
        """Return the resident memory of the process."""
        pages = int((self.proc / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1024

    def threads(self) -> int:
        """Return the number of threads."""
        return len(list((self.proc / "task").iterdir()))

    def cpu(self) -> float:
        """Return how many µs of CPU the process has used (its threads that live)."""
        times = (self.proc / "task").glob("*/schedstat")
        return sum(int(path.read_text().split()[0]) for path in times) / 1000

    def files(self) -> list[str]:
        """Return what the open descriptors of the process are."""
        links = []
        for descriptor in (self.proc / "fd").iterdir():
            try:
                links.append(str(descriptor.readlink()))
            except FileNotFoundError:  # closed in the meantime
                continue
        return links

    def databases(self) -> int:
        """Return the number of open database connections: each has the file open once."""
        return self.files().count(self.database)

    def sockets(self) -> int:
        """Return the number of open sockets."""
        return sum(link.startswith("socket:") for link in self.files())


@contextmanager
def clients(
    server: Server, cookie: str, connections: int, kind: str = "epoll"
) -> Iterator[Program]:
    """Return clients that are connected."""
    with Program("stream_client.py", kind) as program:
        program.ask("connect", connections, server.port, server.path, cookie)
        yield program


def deliver(
    server: Server, program: Program, connections: int, events: int, pause: float = 0
) -> list[float]:
    """Publish events one at a time; return in ms how long each client waited for each of them."""
    latencies: list[float] = []
    for _ in range(events):
        time.sleep(pause)
        program.ask("expect")
        server.ask("publish")
        _, _, nanoseconds = program.ask("wait", connections, 10)
        latencies += (ns / 1e6 for ns in nanoseconds)
    return latencies


def warm_up(server: Server, cookie: str) -> None:
    """Have connections come and go, so that what is measured later is theirs alone."""
    before = server.sockets()
    with clients(server, cookie, WARM_UP) as program:
        deliver(server, program, WARM_UP, 3)
    while server.sockets() > before:
        time.sleep(0.01)


def measure_rate(server: Server, program: Program, connections: int) -> tuple[float, float]:
    """Return how many events a second arrive when they are published back to back, and the lost."""
    events = max(10, BACK_TO_BACK // 10 // max(connections, 10))
    program.ask("expect")
    began = time.monotonic_ns()
    server.ask("publish", events)
    received, last, _ = program.ask("wait", events * connections, 1)
    return received / (last - began) * 1e9, 1 - received / (events * connections)


def measure(side: str, connections: int, database: Path, cookie: str) -> Measurement:
    """Measure one side once."""
    with Server(side, database) as server:
        threads = server.threads()
        warm_up(server, cookie)
        kibibytes = server.kibibytes()
        with clients(server, cookie, connections) as program:
            cpu = server.cpu()
            latencies = deliver(server, program, connections, EVENTS)
            cpu = (server.cpu() - cpu) / len(latencies)
            assert len(latencies) == EVENTS * connections, "an event is missing"
            kibibytes = (server.kibibytes() - kibibytes) / connections
            open_threads, databases = server.threads(), server.databases()
            rate, lost = measure_rate(server, program, connections)
        with clients(server, cookie, connections, "asyncio") as program:
            at_leisure = deliver(server, program, connections, EVENTS)
    return Measurement(
        threads=open_threads,
        more_threads=open_threads - threads,
        kibibytes=kibibytes,
        databases=databases,
        p50=median(latencies),
        p99=percentile_99(latencies),
        p50_asyncio=median(at_leisure),
        cpu=cpu,
        rate=rate,
        lost=lost,
    )


def measure_reports(side: str, database: Path, cookie: str) -> list[float]:
    """Return the ms from a report to one client, once for each of many reports."""
    with Server(side, database) as server:
        warm_up(server, cookie)
        with clients(server, cookie, 1) as program:
            return deliver(server, program, 1, REPORTS, REPORT_PAUSE)


def percentile_99(values: Sequence[float]) -> float:
    """Return what 99 of 100 values do not exceed."""
    return quantiles(values, n=100)[-1]


def print_streams(measured: Measured, connections: int) -> None:
    """Print the medians for so many connections, and ours as a ratio of each peer."""
    ours = measured["ours", connections]
    rows = []
    for side, title in SIDES.items():
        rounds = measured[side, connections]
        p50s = [one.p50 for one in rounds]
        p50s_asyncio = [one.p50_asyncio for one in rounds]
        rows.append(
            (
                title,
                f"{median(one.threads for one in rounds):.0f}",
                f"{median(one.kibibytes for one in rounds):.0f}" if connections > 1 else "-",
                f"{median(one.databases for one in rounds):.0f}",
                f"{median(p50s):.2f}",
                f"{median(one.p99 for one in rounds):.2f}",
                f"{median_ratio([one.p50 for one in ours], p50s):.2f}",
                f"{median(p50s_asyncio):.2f}",
                f"{median_ratio([one.p50_asyncio for one in ours], p50s_asyncio):.2f}",
                f"{median(one.cpu for one in rounds):.0f}",
                f"{median(one.rate for one in rounds):,.0f}",
                f"{median(one.lost for one in rounds):.0%}",
            )
        )
    streams = f"{connections:,} stream{'s' if connections > 1 else ''}"
    head = (streams, "threads", "KiB each", "DB connections", "p50 ms", "p99 ms", "ours / this")
    head += ("p50 ms, asyncio", "ours / this")
    print_table((*head, "µs of CPU", "events/s", "not seen"), rows)


def print_reports(reports: dict[str, list[list[float]]]) -> None:
    """Print how long a report takes to one client."""
    ours = [median(latencies) for latencies in reports["ours"]]
    rows = []
    for side, title in SIDES.items():
        p50s = [median(latencies) for latencies in reports[side]]
        p99 = median(percentile_99(latencies) for latencies in reports[side])
        rows.append((title, f"{median(p50s):.2f}", f"{p99:.2f}", f"{median_ratio(ours, p50s):.2f}"))
    wait = POLLING / 2
    ratio = median(ours) / wait
    rows.append(
        ("polling every 500 ms (computed)", f"{wait:.0f}", f"{POLLING * 0.99:.0f}", f"{ratio:.3f}")
    )
    print_table(("from a report to one client", "p50 ms", "p99 ms", "ours / this"), rows)


def print_budgets(measured: Measured, reports: dict[str, list[list[float]]]) -> None:
    """Say which budgets are met."""
    ours, bare = ([median(latencies) for latencies in reports[side]] for side in ("ours", "bare"))
    print_verdict(
        "a report to one client, p50", median_ratio(ours, bare), REPORT_BUDGET, "times bare ASGI's"
    )
    if ("ours", JUDGED) not in measured:
        return
    rounds = measured["ours", JUDGED]
    theirs = measured["bare", JUDGED]
    ratio = median_ratio([one.p50 for one in rounds], [one.p50 for one in theirs])
    ratio_asyncio = median_ratio(
        [one.p50_asyncio for one in rounds], [one.p50_asyncio for one in theirs]
    )
    for what, value, limit, unit in (
        ("more threads", max(one.more_threads for one in rounds), THREAD_BUDGET, "threads"),
        ("memory", median(one.kibibytes for one in rounds), MEMORY_BUDGET, "KiB each"),
        ("databases", max(one.databases for one in rounds), 0, "connections"),
        ("p50 to asyncio clients", ratio_asyncio, DELIVERY_BUDGET, "times bare ASGI's"),
        ("p50 to epoll clients", ratio, DELIVERY_BUDGET, "times bare ASGI's"),
    ):
        print_verdict(f"{JUDGED:,} streams, {what}", value, limit, unit)


def allow_descriptors(connections: int) -> None:
    """Let this process's children have a descriptor for each connection, and a file besides."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < 2 * connections + 200:
        sys.exit(f"{connections} connections need more than {hard} descriptors (ulimit -Hn).")


def create_user(database: Path) -> str:
    """Make the database, with a user; return the cookie with which that user is logged in."""
    os.environ["STREAMS_DATABASE"] = str(database)
    os.environ["DJANGO_SETTINGS_MODULE"] = "stream_settings"
    django.setup()
    from django.conf import settings
    from django.contrib.auth.models import User
    from django.core.management import call_command
    from django.test import Client

    call_command("migrate", verbosity=0)
    client = Client()
    client.force_login(User.objects.create_user("reader"))
    return f"{settings.SESSION_COOKIE_NAME}={client.cookies[settings.SESSION_COOKIE_NAME].value}"


def run(rounds: int, numbers: Sequence[int]) -> tuple[Measured, dict[str, list[list[float]]]]:
    """Measure all sides in turn, round after round."""
    measured: Measured = {}
    reports: dict[str, list[list[float]]] = {side: [] for side in SIDES}
    with TemporaryDirectory() as directory:
        database = Path(directory) / "db.sqlite3"
        cookie = create_user(database)
        for number in range(rounds):
            for connections in numbers:
                for side in SIDES:
                    one = measure(side, connections, database, cookie)
                    print(f"round {number + 1}: {side}, {connections}: {one}", file=sys.stderr)
                    measured.setdefault((side, connections), []).append(one)
            for side in SIDES:
                served = "reported" if side == "ours" else side
                reports[side].append(measure_reports(served, database, cookie))
    return measured, reports


def run_churn(count: int, seconds: float, seed: int) -> bool:
    """Let readers come, stall and go; print how they have fared, and say whether all is well."""
    rng = random.Random(seed)
    with TemporaryDirectory() as directory:
        cookie = create_user(Path(directory) / "db.sqlite3")
        with Server("ours", Path(directory) / "db.sqlite3") as server:
            before = server.sockets()
            paths = server.ask("start_tasks", TASKS)
            readers = [
                # One in ten stalls, whichever task it watches.
                Reader(server.port, path, cookie, stalls=number % 10 == 0)
                for number, path in zip(range(count), rng.choices(paths, k=count), strict=True)
            ]
            outcome = asyncio.run(churn(readers, server, seconds, rng))
            deadline = time.monotonic() + PATIENCE
            while (left := server.sockets() - before) and time.monotonic() < deadline:
                time.sleep(0.05)
    print(
        f"Seed {seed}: {outcome.readers} readers, {outcome.connections} connections; "
        f"{outcome.without_end} readers are without the final state.",
        f"Who read all the time has seen {outcome.events} events, who stalled at most "
        f"{outcome.stalled_events}.",
        sep="\n",
    )
    print(f"The server has {left} sockets left. Its memory in MiB, every two seconds:")
    print(*(f"{kibibytes / 1024:.0f}" for kibibytes in outcome.memory))
    return outcome.without_end == 0 and left == 0 and is_flat(outcome.memory)


def is_flat(samples: Sequence[float]) -> bool:
    """Whether the last third is no larger than the one before; too few samples say nothing."""
    third = len(samples) // 3
    if third < 5:
        return True
    grown = median(samples[-third:]) - median(samples[third:-third])
    print_verdict("memory grows in the last third by", grown / 1024, CHURN_BUDGET, "MiB")
    return grown / 1024 <= CHURN_BUDGET


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What open streams cost.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    parser.add_argument("--churn", action="store_true")
    parser.add_argument("--readers", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.churn:
        allow_descriptors(options.readers)
        sys.exit(0 if run_churn(options.readers, options.seconds, options.seed) else 1)
    allow_descriptors(max(options.connections))
    measured, reports = run(options.rounds, options.connections)
    print_machine(f"Medians of {options.rounds} interleaved rounds; uvicorn with asyncio and h11.")
    for connections in options.connections:
        print_streams(measured, connections)
    print_reports(reports)
    print_budgets(measured, reports)


if __name__ == "__main__":
    main()
