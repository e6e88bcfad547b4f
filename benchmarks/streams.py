"""
Measure the cost of open streams with this package's view and its peers. See docs/performance.md.

    uv run benchmarks/streams.py [--rounds 5] [--connections 1 100 1000 5000]

Every measurement has one process for the server (uvicorn) and one for all clients. The rounds are
interleaved (A B C D, A B C D, ...) because the speed of a machine changes over minutes.
sides/stream_project.py describes the sides, sides/stream_client.py the clients. The program runs on
Linux only.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from tempfile import TemporaryDirectory

from benchmarks.common.stream_server import Program, Server, allow_descriptors, create_user
from benchmarks.common.tables import median_ratio, print_machine, print_table, print_verdict

SIDES = {
    "ours": "this package",
    "eventstream": "django-eventstream's view",
    "plain": "plain Django async view",
    "bare": "bare ASGI",
}
CONNECTIONS = (1, 100, 1000, 5000)
WARM_UP = 50  # The number of connections that are opened and closed before a measurement.
EVENTS = 20  # The number of events for the latencies; each is published after the last arrived.
# The total number of messages to all clients when events are published without a pause.
BACK_TO_BACK = 40_000
REPORTS = 100
# Seconds between two reports. They are more than PROGRESS_INTERVAL, so that none is throttled.
REPORT_PAUSE = 0.06
POLLING = 500.0  # Milliseconds between two requests of celery-progress.

JUDGED = 1000  # The number of connections for which the program prints the budgets.
THREAD_BUDGET = 5
MEMORY_BUDGET = 60.0  # KiB of the server's memory for each connection.
DELIVERY_BUDGET = 1.3  # The largest ratio of our latency of an event to that of bare ASGI.
REPORT_BUDGET = 2.0  # The largest ratio of our latency of a report to that of bare ASGI.


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One measurement of one side with a number of connections. Times are in ms."""

    threads: int
    more_threads: int
    kibibytes: float  # The memory of the server for each connection, in KiB.
    databases: int
    p50: float
    p99: float
    p50_asyncio: float
    cpu: float  # The CPU time of the server for each event and client, in µs.
    rate: float  # The number of events that all clients together received in a second.
    lost: float  # The share of the messages that the clients did not receive.


# By side and number of connections, a list with one Measurement for each round.
type Measured = dict[tuple[str, int], list[Measurement]]


@contextmanager
def clients(
    server: Server, cookie: str, connections: int, kind: str = "epoll"
) -> Iterator[Program]:
    """Start a process with clients of this kind, and open a stream for each of them."""
    with Program("stream_client.py", kind) as program:
        program.ask("connect", connections, server.port, server.path, cookie)
        yield program


def deliver(
    server: Server, program: Program, connections: int, events: int, pause: float = 0
) -> list[float]:
    """Publish events one at a time; return the ms that each took to reach each client."""
    latencies: list[float] = []
    for _ in range(events):
        time.sleep(pause)
        program.ask("expect")
        server.ask("publish")
        _, _, nanoseconds = program.ask("wait", connections, 10)
        latencies += (ns / 1e6 for ns in nanoseconds)
    return latencies


def warm_up(server: Server, cookie: str) -> None:
    """Open and close connections, so that one-time costs are not part of the measurement."""
    before = server.sockets()
    with clients(server, cookie, WARM_UP) as program:
        deliver(server, program, WARM_UP, 3)
    while server.sockets() > before:
        time.sleep(0.01)


def measure_rate(server: Server, program: Program, connections: int) -> tuple[float, float]:
    """Publish events without a pause; return the events received per second and the lost share."""
    events = max(10, BACK_TO_BACK // 10 // max(connections, 10))
    program.ask("expect")
    began = time.monotonic_ns()
    server.ask("publish", events)
    received, last, _ = program.ask("wait", events * connections, 1)
    return received / (last - began) * 1e9, 1 - received / (events * connections)


def measure(side: str, connections: int, database: Path, cookie: str) -> Measurement:
    """Measure one side with this number of connections, in a new server process."""
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
            asyncio_latencies = deliver(server, program, connections, EVENTS)
    return Measurement(
        threads=open_threads,
        more_threads=open_threads - threads,
        kibibytes=kibibytes,
        databases=databases,
        p50=median(latencies),
        p99=percentile_99(latencies),
        p50_asyncio=median(asyncio_latencies),
        cpu=cpu,
        rate=rate,
        lost=lost,
    )


def measure_reports(side: str, database: Path, cookie: str) -> list[float]:
    """Return the times from REPORTS events of one side to their receipt by one client, in ms."""
    with Server(side, database) as server:
        warm_up(server, cookie)
        with clients(server, cookie, 1) as program:
            return deliver(server, program, 1, REPORTS, REPORT_PAUSE)


def percentile_99(values: Sequence[float]) -> float:
    """Return the value that 99 of 100 values do not exceed."""
    return quantiles(values, n=100)[-1]


def print_streams(measured: Measured, connections: int) -> None:
    """Print the medians for a number of connections, and ours as a ratio of each peer's."""
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
    """Print how long a report takes to reach one client, and a computed value for polling."""
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
    """Print for each budget whether it is met."""
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


def run(rounds: int, numbers: Sequence[int]) -> tuple[Measured, dict[str, list[list[float]]]]:
    """Measure all sides, one after the other in each round; return the results of all rounds."""
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


def main() -> None:
    """Run the benchmark, and print tables and whether each budget is met."""
    parser = argparse.ArgumentParser(description="The cost of open streams.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, nargs="+", default=CONNECTIONS)
    options = parser.parse_args()
    allow_descriptors(max(options.connections))
    measured, reports = run(options.rounds, options.connections)
    print_machine(f"Medians of {options.rounds} interleaved rounds; uvicorn with asyncio and h11.")
    for connections in options.connections:
        print_streams(measured, connections)
    print_reports(reports)
    print_budgets(measured, reports)


if __name__ == "__main__":
    main()
