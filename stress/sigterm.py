"""
Send SIGTERM to loaded web servers, and check that each names its lost tasks and ends in time.

    uv run stress/sigterm.py [--rounds 20] [--jobs 2] [KIND ...]

In each round a new server gets tasks in threads, worker processes and coroutines, of which some
run and report progress and the others wait, and clients that read a stream of each task. Then its
first process receives SIGTERM. Prints one line per kind of server, and exits with 1 after a
violation.
"""

import argparse
import os
import signal
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.project.settings")

from tests.project.tasks import Gate  # noqa: E402
from tests.support.servers import Server, group_has_ended, serve  # noqa: E402
from tests.support.sse_client import event_source  # noqa: E402

KINDS = [
    *("uvicorn", "uvicorn-workers", "daphne", "granian", "granian-wsgi", "hypercorn"),
    *("gunicorn-sync", "gunicorn-gthread", "gunicorn-preload", "gunicorn-uvicorn", "waitress"),
    *("uwsgi", "runserver", "hypercorn-worker"),
]
SHUTDOWN_TIMEOUT = 1
MAX_SECONDS = SHUTDOWN_TIMEOUT + 5  # until all processes of the server have ended
PATIENCE = 30.0  # seconds after which a server that is only slow has ended, too
OPTIONS = {"MAX_WORKERS": 3, "SHUTDOWN_TIMEOUT": SHUTDOWN_TIMEOUT}
THREADS = {"BACKEND": "django_tasks_local.ThreadPoolBackend", "OPTIONS": OPTIONS}
PROCESSES = {"BACKEND": "django_tasks_local.ProcessPoolBackend", "OPTIONS": OPTIONS}
SETTINGS = {
    "TASKS": {"default": THREADS, "processes": PROCESSES, "coroutines": THREADS},
    "TASKS_SSE": {"RETRY": 50},
}
# The alias, the name of a task, its arguments, and the number of tasks: more than workers.
LOAD = [
    ("default", "gated", ["{gate}"], 2),
    ("default", "steps", [100_000, 0.002], 8),
    ("processes", "gated", ["{gate}"], 2),
    ("processes", "steps", [100_000, 0.002], 8),
    ("coroutines", "gated_async", ["{gate}"], 10),
]


def read_stream(url: str, has_begun: threading.Event) -> None:
    """Read a stream, and again after its end, until the server refuses the connection."""
    try:
        for _ in event_source(url):
            has_begun.set()
    except httpx.HTTPError:
        pass
    finally:
        has_begun.set()


def start_load(server: Server, gate: str) -> tuple[list[str], list[str]]:
    """Enqueue the tasks of LOAD; return their ids and the paths of their streams."""
    ids, paths = [], []
    for alias, name, args, count in LOAD:
        filled = [gate if arg == "{gate}" else arg for arg in args]
        started = server.start_task(name, *filled, backend=alias, count=count)
        ids += started["ids"]
        paths.append(started["events"])
    return ids, paths


def run_round(kind: str, directory: Path) -> str:
    """Return "ok", or what was wrong with the end of one server."""
    path = str(directory / "gate")
    gate = Gate(path)
    try:
        with serve(kind, directory, settings=SETTINGS) as server:
            ids, paths = start_load(server, path)
            begun = [threading.Event() for _ in paths]
            for stream, has_begun in zip(paths, begun, strict=True):
                threading.Thread(
                    target=read_stream, args=(server.url + stream, has_begun), daemon=True
                ).start()
            if not all(has_begun.wait(30) for has_begun in begun):
                return "a stream does not begin"
            server.process.send_signal(signal.SIGTERM)
            seconds = wait_for_end(server)
            log = server.log.read_text()
    finally:
        gate.set()
    lost = [line for line in log.splitlines() if "these tasks are lost" in line]
    unnamed = sum(not any(id in line for line in lost) for id in ids)
    faults = [f"{unnamed} of {len(ids)} tasks not named"] if unnamed else []
    if seconds is None:
        faults.append(f"not ended after {PATIENCE:.0f} s")
    elif seconds > MAX_SECONDS:
        faults.append(f"ended after {seconds:.0f} s")
    return ", ".join(faults) or "ok"


def wait_for_end(server: Server) -> float | None:
    """Return the seconds until all processes of the server have ended; None after PATIENCE."""
    began = time.monotonic()
    while (seconds := time.monotonic() - began) < PATIENCE:
        if server.process.poll() is not None and group_has_ended(server.process.pid):
            return seconds
        time.sleep(0.05)
    return None


def run_kind(kind: str, rounds: int, jobs: int) -> bool:
    """Run the rounds of one kind of server and print their outcomes; return whether all are ok."""

    def run(number: int) -> str:
        with TemporaryDirectory(prefix=f"sigterm-{kind}-{number}-") as directory:
            return run_round(kind, Path(directory))

    with ThreadPoolExecutor(jobs) as threads:
        outcomes = Counter(threads.map(run, range(rounds)))
    text = "; ".join(f"{count} {outcome}" for outcome, count in outcomes.most_common())
    print(f"{kind}: {text}", flush=True)
    return set(outcomes) == {"ok"}


def main() -> None:
    """Run all kinds, or those that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*", default=KINDS, metavar="KIND")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=2, help="rounds that run concurrently")
    options = parser.parse_args()
    passed = [run_kind(kind, options.rounds, options.jobs) for kind in options.kinds]
    sys.exit(not all(passed))


if __name__ == "__main__":
    main()
