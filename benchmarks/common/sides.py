"""
Run the sides of a benchmark, each in a process of its own, one after the other in each round.

A side is one library in a program of benchmarks/sides/, called as `PYTHON PROGRAM SIDE TASKS`. It
prints one line of JSON: {scenario: [wall, cpu, cpu with children], ...} in µs per task.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import NamedTuple

from benchmarks.common.tables import median_ratio, print_table

SIDES = Path(__file__).parent.parent / "sides"


class Cost(NamedTuple):
    """The cost of one task in one round, in µs."""

    wall: float
    cpu: float  # The user and system time of the process that enqueues the tasks.
    cpu_with_children: float  # The sum of `cpu` and the same times of the worker processes.


# By side and scenario, a list with one Cost for each round.
type Measured = dict[str, dict[str, list[Cost]]]


def run_side(program: str, side: str, python: str, tasks: int) -> dict[str, Cost]:
    """Run the program of one side in a new process; return the Cost of each scenario."""
    environ = dict(os.environ)
    if python != sys.executable:
        # A checkout on PYTHONPATH would hide the published package of the same name.
        environ.pop("PYTHONPATH", None)
    process = subprocess.Popen(
        [python, str(SIDES / program), side, str(tasks)],
        env=environ,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    with process.stdout:
        line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{program} {side} ended with {process.wait()} before it printed a line.")
    if python != sys.executable:
        # Kill the process group of a peer, because some peers never exit by themselves, and some
        # exit without ending their worker processes.
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {scenario: Cost(*cost) for scenario, cost in json.loads(line).items()}


def run_rounds(program: str, pythons: Mapping[str, str], rounds: int, tasks: int) -> Measured:
    """
    Measure all sides in turn, round after round (A B C, A B C, ...).

    The order is this one because the speed of a machine changes over minutes. `pythons` has the
    Python executable of each side.
    """
    measured: Measured = {side: {} for side in pythons}
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
        for side, python in pythons.items():
            for scenario, cost in run_side(program, side, python, tasks).items():
                measured[side].setdefault(scenario, []).append(cost)
    return measured


def ratio(measured: Measured, scenario: str, peer: str, quantity: str) -> float:
    """Return our cost in a scenario as a ratio of a peer's. `quantity` is a field of Cost."""
    ours, theirs = (
        [getattr(cost, quantity) for cost in measured[side][scenario]] for side in ("ours", peer)
    )
    return median_ratio(ours, theirs)


def print_scenario(
    measured: Measured, titles: Mapping[str, str], scenario: str, *, children: bool
) -> None:
    """
    Print the medians of one scenario, and our wall and CPU time as a ratio of each peer's.

    `children` adds the columns of the CPU time that includes worker processes.
    """
    quantities = ["wall", "cpu", *(["cpu_with_children"] if children else [])]
    rows = []
    for side, title in titles.items():
        if costs := measured[side].get(scenario):
            medians = [median(getattr(cost, name) for cost in costs) for name in quantities]
            ratios = [ratio(measured, scenario, side, name) for name in quantities]
            rows.append(
                (
                    title,
                    *(f"{value:,.1f}" for value in medians),
                    f"{1e6 / medians[0]:,.0f}",
                    *(f"{value:.2f}" for value in ratios),
                )
            )
    cpu = ["CPU", *(["CPU with children"] if children else [])]
    head = [scenario, "µs per task", *(f"µs of {name}" for name in cpu), "tasks/s"]
    print_table([*head, "ours / this", *(f"ours / this, {name}" for name in cpu)], rows)
