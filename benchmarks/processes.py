"""
Measure the cost of a task in a worker process with this package and its peers.
See docs/performance.md.

    uv run benchmarks/processes.py [--rounds 7] [--tasks 10000]

It measures these sides:

- ours: `ProcessPoolBackend` of this checkout
- threads: `ThreadPoolBackend` of this checkout, for the tasks that compute
- 2.0: `ProcessPoolBackend` of the published django-tasks-local 2.0
- bare: `concurrent.futures.ProcessPoolExecutor`
- loky: `loky.ProcessPoolExecutor`
- pebble: `pebble.ProcessPool`

The peers share an environment of their own, because 2.0 has the same import name. The executors
keep no results and send no events. DEBUG is False, and logging is Django's default for every side.
sides/process_side.py describes the timed interval, the notification that each side waits for, and
how CPU time is read. A budget compares wall time per task, as the median of the ratios of all
rounds. The program runs on Linux only.
"""

import argparse
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.common.environments import make_environment
from benchmarks.common.sides import Measured, print_scenario, ratio, run_rounds
from benchmarks.common.tables import print_machine, print_verdict

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
SCENARIOS = ("noop", "noop, one at a time", "four computing tasks")
# Each budget consists of a scenario, a peer, and the largest ratio of our wall time to the peer's.
# There are no budgets for pebble and loky, because pebble breaks after a few killed workers.
BUDGETS = (
    ("noop", "2.0", 0.65),
    ("noop", "bare", 1.0),
)


def measure(rounds: int, tasks: int) -> Measured:
    """Measure all sides, one after the other in each round; return the costs of all rounds."""
    with TemporaryDirectory() as directory:
        peers = str(make_environment(Path(directory), *PEERS))
        pythons = {side: sys.executable if side in OURS else peers for side in SIDES}
        return run_rounds("process_side.py", pythons, rounds, tasks)


def main() -> None:
    """Run the benchmark, and print tables and whether each budget is met."""
    parser = argparse.ArgumentParser(description="The cost of a task in a process.")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tasks", type=int, default=10_000)
    options = parser.parse_args()
    measured = measure(options.rounds, options.tasks)
    print_machine(
        f"Medians of {options.rounds} interleaved rounds, two worker processes,",
        f"{options.tasks:,} tasks ({options.tasks // 20:,} one at a time).",
        "DEBUG False, Django's default logging.",
    )
    for scenario in SCENARIOS:
        print_scenario(measured, SIDES, scenario, children=True)
    for scenario, peer, limit in BUDGETS:
        value = ratio(measured, scenario, peer, "wall")
        print_verdict(f"{scenario}, our wall time", value, limit, f"times that of {SIDES[peer]}")


if __name__ == "__main__":
    main()
