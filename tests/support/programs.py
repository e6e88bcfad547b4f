"""Programs that some tests need."""

import os

import pytest


def require(program: str | None, name: str) -> str:
    """Skip the test if the program is absent; fail it in CI, which installs all programs."""
    if program is None:
        message = f"{name} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return program
