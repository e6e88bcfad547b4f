"""
What a task in a thread costs: this package beside its peers. See docs/performance.md.

    uv run benchmarks/threads.py [--rounds 7] [--tasks 20000]

Every side runs in a process of its own, and the rounds are interleaved (A B C D, A B C D, ...),
because a machine is not equally fast at all times. The published 2.0, which has the same import
name, gets an environment of its own in a temporary directory.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from environments import make_environment
from tables import median_ratio, print_machine, print_table, print_verdict

SIDES = {
    "ours": "ThreadPoolBackend",
    "2.0": "django-tasks-local 2.0",
    "Immediate": "Django's ImmediateBackend",
    "bare": "bare ThreadPoolExecutor",
}
BUDGET = 0.9  # of the time of 2.0

# For each side and scenario, round by round: µs by the clock, and µs of CPU.
type Measured = dict[str, dict[str, list[tuple[float, float]]]]


def run_side(side: str, python: str, tasks: int) -> dict[str, tuple[float, float]]:
    """Measure one side once."""
    environ = dict(os.environ)
    if side == "2.0":
        environ.pop("PYTHONPATH", None)  # It could lead to our own package.
    script = Path(__file__).with_name("thread_side.py")
    output = subprocess.run(
        [python, str(script), side, str(tasks)],
        check=True,
        stdout=subprocess.PIPE,
        env=environ,
    ).stdout
    measured: dict[str, tuple[float, float]] = json.loads(output)
    return measured


def measure(rounds: int, tasks: int) -> Measured:
    """Measure all sides in turn, round after round."""
    measured: Measured = {side: {} for side in SIDES}
    with TemporaryDirectory() as directory:
        pythons = dict.fromkeys(SIDES, sys.executable)
        pythons["2.0"] = str(make_environment(Path(directory), "django-tasks-local==2.0"))
        for number in range(rounds):
            print(f"round {number + 1} of {rounds}", file=sys.stderr)
            for side, python in pythons.items():
                for scenario, times in run_side(side, python, tasks).items():
                    measured[side].setdefault(scenario, []).append(times)
    return measured


def print_scenario(measured: Measured, scenario: str) -> None:
    """Print one scenario: medians, and ours as a ratio of each peer."""
    ours = [wall for wall, _ in measured["ours"][scenario]]
    rows = []
    for side, title in SIDES.items():
        walls, cpus = zip(*measured[side][scenario], strict=True)
        wall = median(walls)
        rows.append(
            (
                title,
                f"{wall:.1f}",
                f"{median(cpus):.1f}",
                f"{1e6 / wall:,.0f}",
                f"{median_ratio(ours, walls):.2f}",
            )
        )
    print_table((scenario, "µs per task", "µs of CPU", "tasks/s", "ours / this"), rows)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="What a task in a thread costs.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", type=int, default=20_000)
    options = parser.parse_args()
    measured = measure(options.rounds, options.tasks)
    print_machine(
        f"Medians of {options.rounds} interleaved rounds, {options.tasks:,} tasks each",
        f"({options.tasks // 10:,} one at a time). DEBUG False, Django's default logging.",
    )
    scenarios = list(measured["ours"])
    for scenario in scenarios:
        print_scenario(measured, scenario)
    for scenario in scenarios:
        ours, theirs = ([wall for wall, _ in measured[side][scenario]] for side in ("ours", "2.0"))
        ratio = median_ratio(ours, theirs)
        print_verdict(f"{scenario}: our time", ratio, BUDGET, "times that of 2.0")


if __name__ == "__main__":
    main()
