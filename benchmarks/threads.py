"""
Measure the cost of a task in a thread with this package and its peers. See docs/performance.md.

    uv run benchmarks/threads.py [--rounds 7] [--tasks 20000]

It measures these sides:

- ours: `ThreadPoolBackend` of this checkout
- 2.0: `ThreadPoolBackend` of the published django-tasks-local 2.0, in an environment of its own,
  because its import name is the same
- Immediate: Django's `ImmediateBackend`, without this package imported
- bare: `concurrent.futures.ThreadPoolExecutor`, which keeps no results

DEBUG is False, and logging is Django's default for every side. sides/thread_side.py describes
the timed interval. A budget compares CPU time per task, as the median of the ratios of all rounds.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common.environments import make_environment
from benchmarks.common.sides import Measured, print_scenario, ratio, run_rounds
from benchmarks.common.tables import print_machine, print_verdict

SIDES = {
    "ours": "ThreadPoolBackend",
    "2.0": "django-tasks-local 2.0",
    "Immediate": "Django's ImmediateBackend",
    "bare": "bare ThreadPoolExecutor",
}
# Each budget consists of a scenario, a peer, and the largest ratio of our CPU time to the peer's.
BUDGETS = (
    ("10 workers", "2.0", 0.75),
    ("1 worker", "2.0", 0.75),
    ("10 workers", "Immediate", 0.5),
    ("1 worker", "Immediate", 0.5),
    ("one at a time", "2.0", 1.1),
)


def measure(rounds: int, tasks: int) -> Measured:
    """Measure all sides, one after the other in each round; return the costs of all rounds."""
    with TemporaryDirectory() as directory:
        pythons = dict.fromkeys(SIDES, sys.executable)
        pythons["2.0"] = str(make_environment(Path(directory), "django-tasks-local==2.0"))
        return run_rounds("thread_side.py", pythons, rounds, tasks)


def main() -> None:
    """Run the benchmark, and print tables and whether each budget is met."""
    parser = argparse.ArgumentParser(description="The cost of a task in a thread.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", type=int, default=20_000)
    options = parser.parse_args()
    measured = measure(options.rounds, options.tasks)
    print_machine(
        f"Medians of {options.rounds} interleaved rounds, {options.tasks:,} tasks each",
        f"({options.tasks // 10:,} one at a time). DEBUG False, Django's default logging.",
    )
    for scenario in measured["ours"]:
        print_scenario(measured, SIDES, scenario, children=False)
    for scenario, peer, limit in BUDGETS:
        value = ratio(measured, scenario, peer, "cpu")
        print_verdict(f"{scenario}, our CPU time", value, limit, f"times that of {SIDES[peer]}")


if __name__ == "__main__":
    main()
