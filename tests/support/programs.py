"""Programs that tests need and that may be absent."""

import os

import pytest


def require(program: str | None, name: str) -> str:
    """Skip a test that needs an absent program; in CI, where it must be there, fail."""
    if program is None:
        message = f"{name} is not installed"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    return program
