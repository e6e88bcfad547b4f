"""What tasks leave behind on a real PostgreSQL: connections, and failures after its restart."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.postgres import Postgres, postgres  # noqa: F401 - a fixture

SCRIPT = Path(__file__).with_name("database_script.py")
MODES = ["closed", "kept for a time", "kept", "pooled"]
WORKERS = 2
POOL = 2
TASKS = 600


def play(postgres: Postgres, *args: str) -> dict[str, list[Any]]:  # noqa: F811 - the fixture
    """Run the script, restart the server when it says so, and return what it has told."""
    told: dict[str, list[Any]] = {}
    with subprocess.Popen(
        [sys.executable, "-W", "error", str(SCRIPT), *args],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as script:
        assert script.stdin is not None
        assert script.stdout is not None
        for line in script.stdout:
            title, facts = json.loads(line)
            told.setdefault(title, []).append(facts)
            if title == "restart":
                postgres.restart()
                script.stdin.write("\n")
                script.stdin.flush()
    assert script.returncode == 0
    return told


@pytest.mark.parametrize("backend", ["ThreadPoolBackend", "ProcessPoolBackend"])
def test_connections(postgres: Postgres, backend: str) -> None:  # noqa: F811 - the fixture
    """
    With every way that Django has to keep connections, and tasks that are functions and coroutines.

    The server is restarted twice: when each worker has an idle connection of each kind, and when
    it runs a task that has them. Only the task that goes on to use one of them fails.
    """
    told = play(postgres, backend, postgres.host, postgres.user, str(TASKS))
    each = {"SUCCESSFUL": TASKS // len(MODES)}
    assert told["before"] == [{}]
    assert told["many"] == [dict.fromkeys(MODES, each)]
    assert told["in use"] == [[0] * 2 * WORKERS]
    (after,) = told["after"]
    pools = WORKERS if backend == "ProcessPoolBackend" else 1
    assert after.pop("pooled") <= POOL * pools
    assert after.pop("kept") <= WORKERS
    assert after.pop("kept for a time") <= WORKERS
    assert after == {}
    broken = {"SUCCESSFUL": 1, "django.db.utils.OperationalError": 1}
    assert told["outlived"] == [{"SUCCESSFUL": 2}, broken]
    assert told["later"] == [{mode: {"SUCCESSFUL": 20} for mode in MODES}] * 2
    # Threads share this process's pool, which stays; and nothing else does.
    (closed,) = told["closed"]
    assert closed.pop("pooled", 0) <= (POOL if backend == "ThreadPoolBackend" else 0)
    assert closed == {}
