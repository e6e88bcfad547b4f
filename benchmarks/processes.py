"""
What a task in a process costs: this package beside its peers. See docs/performance.md.

    uv run benchmarks/processes.py [--rounds 7] [--tasks 10000]

Every side runs in a process of its own, and the rounds are interleaved (A B C, A B C, ...), because
a machine is not equally fast at all times. The peers get an environment of their own in a temporary
directory: the published 2.0 has the same import name.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from environments import make_environment
from tables import median_ratio, print_machine, print_table, print_verdict

SIDES = {
    "ours": "ProcessPoolBackend",
    "threads": "ThreadPoolBackend",
    "2.0": "django-tasks-local 2.0",
    "bare": "bare ProcessPoolExecutor",
    "loky": "loky",
    "pebble": "pebble",
}
OURS = ("ours", "threads")
PEERS = ("django-tasks-local==2.0", "loky", "pebble")
BUDGET = 0.5  # of the time of 2.0

# For each side and scenario the seconds, round by round.
type Measured = dict[str, dict[str, list[float]]]


def run_side(side: str, python: str, tasks: int) -> dict[str, float]:
    """Measure one side once."""
    environ = dict(os.environ)
    if side not in OURS:
        environ.pop("PYTHONPATH", None)  # It could lead to our own package.
    script = Path(__file__).with_name("process_side.py")
    process = subprocess.Popen(
        [python, str(script), side, str(tasks)],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        measured: dict[str, float] = json.loads(process.stdout.readline())
    if side not in OURS:
        # Not every peer ends by itself, and some leave their workers behind.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return measured


def measure(rounds: int, tasks: int) -> Measured:
    """Measure all sides in turn, round after round."""
    measured: Measured = {side: {} for side in SIDES}
    with TemporaryDirectory() as directory:
        theirs = str(make_environment(Path(directory), *PEERS))
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for side in SIDES:
                python = sys.executable if side in OURS else theirs
                for scenario, seconds in run_side(side, python, tasks).items():
                    measured[side].setdefault(scenario, []).append(seconds)
    return measured


def print_scenario(measured: Measured, scenario: str, tasks: int) -> None:
    """Print one scenario: medians, and ours as a ratio of each peer."""
    ours = measured["ours"][scenario]
    rows = []
    for side, title in SIDES.items():
        if scenario in measured[side]:
            times = measured[side][scenario]
            each = median(times) / tasks
            ratio = f"{median_ratio(ours, times):.2f}"
            rows.append((title, f"{each * 1e6:,.0f}", f"{1 / each:,.0f}", ratio))
    print_table((scenario, "µs per task", "tasks/s", "ours / this"), rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a task in a process costs.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", type=int, default=10_000)
    options = parser.parse_args()
    measured = measure(options.rounds, options.tasks)
    print_machine(f"Medians of {options.rounds} interleaved rounds, two worker processes.")
    print_scenario(measured, "noop", options.tasks)
    print_scenario(measured, "noop, one at a time", options.tasks // 20)
    print_scenario(measured, "four computing tasks", 4)
    for scenario in ("noop", "noop, one at a time"):
        ratio = median_ratio(measured["ours"][scenario], measured["2.0"][scenario])
        print_verdict(f"{scenario}: our time", ratio, BUDGET, "times that of 2.0")


if __name__ == "__main__":
    main()
