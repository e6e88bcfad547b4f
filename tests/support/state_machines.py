"""
Settings and runner of the state machines in `tests/properties`.

A machine applies generated steps to the product and to a small model, and compares both. In CI
all runs generate the same steps; elsewhere a failure prints the steps that lead to it.
"""

import os

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

EXAMPLES = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,  # A busy computer makes steps slow.
    database=None,
    derandomize=os.environ.get("CI") == "true",
)

# Hypothesis shrinks a failing sequence of steps for up to five minutes.
SHRINK_TIMEOUT = pytest.mark.timeout(360)


def run_machine(machine: type[RuleBasedStateMachine]) -> None:
    """Run a machine with EXAMPLES."""
    run_state_machine_as_test(machine, settings=EXAMPLES)
