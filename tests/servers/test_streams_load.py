"""Many readers at once, and readers that behave badly, at a uvicorn in a process of its own."""

import resource
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.project import tasks
from tests.support.paths import ROOT
from tests.support.servers import Server, serve
from tests.support.sse_client import read_all
from tests.support.waiting import LIMIT, wait_until

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close() sends RST, as when a client has crashed.

CLIENT = """
import socket, sys, time
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as client:
    client.sendall(sys.argv[2].encode())
    while b"event: " not in client.recv(65536):
        pass
    print("begun", flush=True)
    time.sleep(60)
"""


@pytest.fixture(scope="module", autouse=True)
def descriptors() -> Iterator[None]:
    """Have as many descriptors as the system allows, in the server too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


BACKEND = {
    "BACKEND": "django_tasks_local.ThreadPoolBackend",
    "OPTIONS": {"PROGRESS_INTERVAL": 0.001},
}


@pytest.fixture(scope="module")
def uvicorn(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for all but the test that ends it."""
    # What keeps a connection alive would also find out that nobody is there.
    settings = {"TASKS": {"default": BACKEND}, "TASKS_SSE": {"KEEPALIVE": 10 * LIMIT}}
    with serve("uvicorn", tmp_path_factory.mktemp("uvicorn"), settings=settings) as server:
        yield server


def request(path: str) -> bytes:
    # HTTP/1.0, so that the response comes as it is and not in chunks.
    return f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()


def connect(server: Server, path: str, receive_buffer: int | None = None) -> socket.socket:
    """Ask for a stream, and read nothing of it."""
    client = socket.socket()
    client.settimeout(LIMIT)
    if receive_buffer is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    client.connect(("127.0.0.1", server.port))
    client.sendall(request(path))
    return client


def read_until(client: socket.socket, content: bytes) -> None:
    received = b""
    while content not in received:
        chunk = client.recv(65536)
        assert chunk, received
        received += chunk


def read_to_end(client: socket.socket) -> bytes:
    return b"".join(iter(lambda: client.recv(65536), b""))


def readers(server: Server) -> int:
    """The number of streams that the server knows of."""
    count: int = httpx.get(f"{server.url}/readers/", timeout=LIMIT).json()["readers"]
    return count


def threads(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


def resident_mebibytes(server: Server) -> float:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def test_readers_that_stall_and_readers_that_come_and_go() -> None:
    """A small run of stress/stream_churn.py: each reader has the final state in the end."""
    script = ROOT / "stress" / "stream_churn.py"
    done = subprocess.run(
        [sys.executable, str(script), "--readers", "300", "--seconds", "3"],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 readers are without the final state" in done.stdout


def drop_connections(server: Server, path: str, count: int) -> None:
    """Open connections, and drop them when a quarter has begun: every other one with RST."""
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server, path)) for _ in range(count)]
        for client in clients[: count // 4]:
            read_until(client, b"event: ")
        for client in clients[::2]:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def reset(server: Server, path: str) -> None:
    """Open a stream, and close it with RST."""
    with connect(server, path) as client:
        read_until(client, b"event: ")
        assert readers(server) == 1
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def kill_while_stopped(server: Server, path: str) -> None:
    """Open a stream in a process that is stopped, neither reading nor closing, and then killed."""
    command = [sys.executable, "-c", CLIENT, str(server.port), request(path).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            process.send_signal(signal.SIGSTOP)
            assert readers(server) == 1
        finally:
            process.kill()


def test_connections_that_are_dropped_at_once(uvicorn: Server, gate: str) -> None:
    path = uvicorn.start_task("gated", gate)["events"]
    assert readers(uvicorn) == 0
    before = threads(uvicorn)
    drop_connections(uvicorn, path, 1000)
    # While the task still runs: it is not its end that closes them.
    wait_until(lambda: readers(uvicorn) == 0, "streams stay")
    wait_until(lambda: threads(uvicorn) <= before + 1, "threads stay")
    tasks.gates[gate].set()
    assert read_all(uvicorn.url + path)[-1].event == "finished"
    assert "Traceback" not in uvicorn.log.read_text()


def test_a_client_that_never_reads(uvicorn: Server) -> None:
    """It costs a bounded amount of memory, and has the latest state when it reads again."""
    count, size = 400, 250_000
    read_all(uvicorn.url + uvicorn.start_task("large", 3, size, 0.002)["events"])
    before = resident_mebibytes(uvicorn)
    path = uvicorn.start_task("large", count, size, 0.002)["events"]
    with connect(uvicorn, path, receive_buffer=4096) as lazy:
        received = read_all(uvicorn.url + path)
        assert received[-1].event == "finished", "somebody else's stream is held up"
        grown = resident_mebibytes(uvicorn) - before
        content = read_to_end(lazy)
    assert grown < 0.4 * count * size / 2**20
    last = content.split(b"\n\n")[-2]
    assert b"event: finished" in last
    assert b'"status":"SUCCESSFUL"' in last
    assert content.count(b"event: ") < 20


@pytest.mark.parametrize("vanish", [reset, kill_while_stopped])
def test_a_client_that_vanishes(
    uvicorn: Server, gate: str, vanish: Callable[[Server, str], None]
) -> None:
    """It is forgotten while its task still runs, though nothing was sent to it."""
    path = uvicorn.start_task("gated", gate)["events"]
    vanish(uvicorn, path)
    wait_until(lambda: readers(uvicorn) == 0, "the stream stays")
    tasks.gates[gate].set()
    assert read_all(uvicorn.url + path)[-1].event == "finished"


def test_an_exit_with_500_open_streams(tmp_path: Path) -> None:
    """No task runs that could be waited for, so the server ends at once."""
    with serve("uvicorn", tmp_path) as server, ExitStack() as stack:
        path = server.start_task("noop", backend="dummy")["events"]
        clients = [stack.enter_context(connect(server, path)) for _ in range(500)]
        for client in clients:
            read_until(client, b"event: enqueued")
        assert server.stop() < 3.0
        assert all(read_to_end(client) == b"" for client in clients)
        assert "Traceback" not in server.log.read_text()
