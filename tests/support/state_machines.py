"""
How the tests in `properties` run: any interleaving of the steps of a machine.

Each machine does generated steps with the real thing and with a tiny model, and compares them.
Under CI the steps are the same in every run; elsewhere a failure prints those that lead to it.
"""

import os

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

EXAMPLES = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,  # The machine that tests run on may be busy.
    database=None,
    derandomize=os.environ.get("CI") == "true",
)

# Hypothesis takes up to five minutes to simplify what has failed.
SIMPLIFYING = pytest.mark.timeout(360)


def run_machine(machine: type[RuleBasedStateMachine]) -> None:
    """Run a machine's steps."""
    run_state_machine_as_test(machine, settings=EXAMPLES)
