"""require() skips or fails tests that need an absent program."""

import os

import pytest


def require(program: str | None, name: str) -> str:
    """
    Skip the test if `program` is None; in CI, which installs all programs, fail the test.

    Return `program` otherwise.
    """
    if program is None:
        message = f"{name} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return program
