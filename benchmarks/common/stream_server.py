"""
Start the server of benchmarks/streams.py and stress/stream_churn.py in a process of its own.

The programs in benchmarks/sides/ read commands from stdin and print one answer for each. This
module reads /proc, so it works on Linux only.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any, Self

import django

SIDES = Path(__file__).parent.parent / "sides"


class Program:
    """Runs a program of benchmarks/sides/ in a process and sends commands to it."""

    def __init__(self, script: str, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SIDES / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.process.kill()
        self.process.communicate()

    def answer(self) -> Any:
        """Wait for one line that the program prints, and decode its JSON."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())

    def ask(self, command: str, *arguments: object) -> Any:
        """Send a command to the program and return the answer that the program prints."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, *arguments]) + "\n")
        self.process.stdin.flush()
        return self.answer()


class Server(Program):
    """Runs uvicorn with one side of benchmarks/sides/stream_project.py."""

    def __init__(self, side: str, database: Path) -> None:
        super().__init__("stream_side.py", side)
        self.database = str(database)
        self.port, self.path = self.answer()
        self.proc = Path("/proc") / str(self.process.pid)

    def kibibytes(self) -> float:
        """Return the resident memory of the server process in KiB."""
        pages = int((self.proc / "statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1024

    def threads(self) -> int:
        """Return the number of threads of the server process."""
        return len(list((self.proc / "task").iterdir()))

    def cpu(self) -> float:
        """Return the CPU time of the living threads of the server process, in µs."""
        times = (self.proc / "task").glob("*/schedstat")
        return sum(int(path.read_text().split()[0]) for path in times) / 1000

    def files(self) -> list[str]:
        """Return the path or name behind each open file descriptor of the server process."""
        links = []
        for descriptor in (self.proc / "fd").iterdir():
            try:
                links.append(str(descriptor.readlink()))
            except FileNotFoundError:  # The server closed the descriptor after iterdir() listed it.
                continue
        return links

    def databases(self) -> int:
        """Return the number of open SQLite connections, each of which has the file open once."""
        return self.files().count(self.database)

    def sockets(self) -> int:
        """Return the number of open sockets of the server process."""
        return sum(link.startswith("socket:") for link in self.files())


def allow_descriptors(connections: int) -> None:
    """Raise the limit of file descriptors; exit if it allows less than two per connection."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < 2 * connections + 200:
        sys.exit(f"{connections} connections need more than {hard} descriptors (ulimit -Hn).")


def create_user(database: Path) -> str:
    """Create the database with one user and return the cookie of that user's session."""
    os.environ["STREAMS_DATABASE"] = str(database)
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.sides.stream_settings"
    django.setup()
    from django.conf import settings
    from django.contrib.auth.models import User
    from django.core.management import call_command
    from django.test import Client

    call_command("migrate", verbosity=0)
    client = Client()
    client.force_login(User.objects.create_user("reader"))
    return f"{settings.SESSION_COOKIE_NAME}={client.cookies[settings.SESSION_COOKIE_NAME].value}"
