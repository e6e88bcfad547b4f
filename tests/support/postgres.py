"""The fixture `postgres` runs a private PostgreSQL server in a temporary directory."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from tests.project.tasks import LIMIT
from tests.support.programs import require

# Debian's package installs PostgreSQL's server programs in this folder, outside of the PATH.
PROGRAMS = Path("/usr/lib/postgresql")
SETTINGS = "-c listen_addresses= -c fsync=off -c max_connections=200"


def _program(name: str) -> str:
    found = [str(path) for path in sorted(PROGRAMS.glob(f"*/bin/{name}"))]
    return require(shutil.which(name) or (found[-1] if found else None), "PostgreSQL")


class Postgres:
    """
    A running PostgreSQL server that accepts connections only at its socket in the directory `host`.
    """

    user = "postgres"

    def __init__(self, directory: Path) -> None:
        self.host = str(directory)
        self._data = str(directory / "data")
        # PostgreSQL refuses to run as root, but in a container the tests run as root.
        self._owner = self.user if os.geteuid() == 0 else None
        if self._owner is not None:
            shutil.chown(directory, self._owner)
        # Without --encoding, the locale of the environment decides; in "C" it would be SQL_ASCII.
        options = "--no-sync", "--auth=trust", "--locale=C", "--encoding=UTF8"
        self._run("initdb", *options, f"--username={self.user}")
        self._control("start", f"--options=-k {self.host} {SETTINGS}", f"--log={directory}/log")

    def restart(self) -> None:
        """Restart PostgreSQL without a clean shutdown, as after a crash."""
        self._control("restart", "--mode=immediate", f"--log={self.host}/log")

    def stop(self) -> None:
        """Stop PostgreSQL without a clean shutdown, because its data is no longer needed."""
        self._control("stop", "--mode=immediate")

    def connect(self) -> psycopg.Connection:
        """Return a psycopg connection that Django does not manage."""
        return psycopg.connect(host=self.host, user=self.user, dbname="postgres", autocommit=True)

    def _control(self, *args: str) -> None:
        self._run("pg_ctl", "--silent", "--wait", *args)

    def _run(self, program: str, *args: str) -> None:
        subprocess.run(
            [_program(program), f"--pgdata={self._data}", *args],
            cwd=self.host,
            user=self._owner,
            group=self._owner,
            # PostgreSQL inherits these streams; if they were pipes, it would keep them open.
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            timeout=2 * LIMIT,
            check=True,
        )


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """Return a PostgreSQL server for all tests of the session; a test may restart the server."""
    _program("initdb")
    with tempfile.TemporaryDirectory(prefix="postgres-") as directory:
        server = Postgres(Path(directory))
        try:
            yield server
        finally:
            server.stop()
