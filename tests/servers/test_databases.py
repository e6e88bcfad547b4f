"""Tests of the PostgreSQL connections that tasks keep open, and of a restart of PostgreSQL."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.support.paths import ROOT
from tests.support.postgres import Postgres

SCRIPT = Path(__file__).with_name("database_script.py")
MODES = ["closed", "kept for a time", "kept", "pooled"]
WORKERS = 2
POOL = 2
TASKS = 600


def run_script(postgres: Postgres, *args: str) -> dict[str, list[Any]]:
    """Run database_script.py, restart PostgreSQL when it asks, and return its facts by title."""
    facts: dict[str, list[Any]] = {}
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
            title, fact = json.loads(line)
            facts.setdefault(title, []).append(fact)
            if title == "restart":
                postgres.restart()
                script.stdin.write("\n")
                script.stdin.flush()
    assert script.returncode == 0
    return facts


@pytest.mark.parametrize("backend", ["ThreadPoolBackend", "ProcessPoolBackend"])
def test_connections_and_server_restart(postgres: Postgres, backend: str) -> None:
    """
    Workers keep at most one connection each, and tasks reconnect after PostgreSQL restarts.

    Sync tasks, async tasks and sync tasks that call asyncio.run() use each of Django's ways to keep
    connections. PostgreSQL restarts twice: while each worker has an idle connection to each alias,
    and while each worker runs a task that has used one. Only a running task that queries again
    after the restart fails.
    """
    facts = run_script(postgres, backend, postgres.host, postgres.user, str(TASKS))
    each = {"SUCCESSFUL": TASKS // len(MODES)}
    assert facts["before"] == [{}]
    assert facts["many"] == [dict.fromkeys(MODES, each)]
    assert facts["in use"] == [[0] * 2 * WORKERS]
    (after,) = facts["after"]
    pools = WORKERS if backend == "ProcessPoolBackend" else 1
    assert after.pop("pooled") <= POOL * pools
    assert after.pop("kept") <= WORKERS
    assert after.pop("kept for a time") <= WORKERS
    assert after == {}
    broken = {"SUCCESSFUL": 1, "django.db.utils.OperationalError": 1}
    assert facts["outlived"] == [{"SUCCESSFUL": 2}, broken]
    assert facts["later"] == [{mode: {"SUCCESSFUL": 30} for mode in MODES}] * 2
    # With ThreadPoolBackend psycopg's connection pool belongs to the script's own process and stays
    # open until it exits. close() has closed all other connections.
    (closed,) = facts["closed"]
    assert closed.pop("pooled", 0) <= (POOL if backend == "ThreadPoolBackend" else 0)
    assert closed == {}


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_encoding_of_server_depends_on_the_locale(
    monkeypatch: pytest.MonkeyPatch, locale: str
) -> None:
    """The PostgreSQL of the tests uses UTF-8 in each locale, so that Django can store any text."""
    monkeypatch.setenv("LC_ALL", locale)
    with TemporaryDirectory(prefix="postgres-") as directory:
        server = Postgres(Path(directory))
        try:
            with server.connect() as connection:
                assert connection.execute("SHOW server_encoding").fetchone() == ("UTF8",)
        finally:
            server.stop()
