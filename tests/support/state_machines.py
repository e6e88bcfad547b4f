"""
run_machine() runs the state machines of `tests/properties` with Hypothesis.

A machine applies generated steps to the tested classes and to a small model, and compares the two.
In CI all runs generate the same steps; elsewhere each run generates other steps. A failure prints
the steps that lead to it.
"""

import os

import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, run_state_machine_as_test

EXAMPLES = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,  # Steps are slow on a busy machine.
    database=None,
    derandomize=os.environ.get("CI") == "true",
)

# Hypothesis shrinks a failing sequence of steps for up to five minutes, so tests may take longer.
SHRINK_TIMEOUT = pytest.mark.timeout(360)


def run_machine(machine: type[RuleBasedStateMachine]) -> None:
    """Run a state machine with the settings EXAMPLES; fail if an assertion in it fails."""
    run_state_machine_as_test(machine, settings=EXAMPLES)
