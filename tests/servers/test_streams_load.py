"""Tests of uvicorn in a process of its own, with many clients and clients that misbehave."""

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

# Value of SO_LINGER with which close() sends RST, as the kernel does when a client crashes.
RESET = struct.pack("ii", 1, 0)

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
def raise_file_limit() -> Iterator[None]:
    """Raise the limit of open files to the hard limit; the server processes inherit it."""
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
    """Start a server that all tests share, except test_exit_with_500_open_streams."""
    # KEEPALIVE is longer than any test, so the server must notice a lost client without a write.
    settings = {"TASKS": {"default": BACKEND}, "TASKS_SSE": {"KEEPALIVE": 10 * LIMIT}}
    with serve("uvicorn", tmp_path_factory.mktemp("uvicorn"), settings=settings) as server:
        yield server


def request(path: str) -> bytes:
    # The request uses HTTP/1.0, so that the server does not use chunked encoding.
    return f"GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode()


def connect(server: Server, path: str, receive_buffer: int | None = None) -> socket.socket:
    """Request a stream without reading the response."""
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


def open_streams(server: Server) -> int:
    """Return the number of streams that the server has open."""
    count: int = httpx.get(f"{server.url}/readers/", timeout=LIMIT).json()["readers"]
    return count


def count_threads(server: Server) -> int:
    return len(list(Path(f"/proc/{server.process.pid}/task").iterdir()))


def resident_mebibytes(server: Server) -> float:
    pages = int(Path(f"/proc/{server.process.pid}/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def test_stalled_and_reconnecting_clients() -> None:
    """In a short run of stress/stream_churn.py every client receives the final state."""
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
    """Open connections, read from a quarter of them, then close all, every other one with RST."""
    with ExitStack() as stack:
        clients = [stack.enter_context(connect(server, path)) for _ in range(count)]
        for client in clients[: count // 4]:
            read_until(client, b"event: ")
        for client in clients[::2]:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def close_with_rst(server: Server, path: str) -> None:
    """Open a stream, read its first event, and close the connection with RST."""
    with connect(server, path) as client:
        read_until(client, b"event: ")
        assert open_streams(server) == 1
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def kill_while_stopped(server: Server, path: str) -> None:
    """Kill a process with an open stream while SIGSTOP keeps it from reading or closing it."""
    command = [sys.executable, "-c", CLIENT, str(server.port), request(path).decode()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"begun\n"
            process.send_signal(signal.SIGSTOP)
            assert open_streams(server) == 1
        finally:
            process.kill()


def test_thousand_dropped_connections(uvicorn: Server, gate: str) -> None:
    path = uvicorn.start_task("gated", gate)["events"]
    assert open_streams(uvicorn) == 0
    before = count_threads(uvicorn)
    drop_connections(uvicorn, path, 1000)
    # The task still runs, so the server closes the streams because of the lost clients.
    wait_until(lambda: open_streams(uvicorn) == 0, "streams stay open")
    wait_until(lambda: count_threads(uvicorn) <= before + 1, "threads stay alive")
    tasks.gates[gate].set()
    assert read_all(uvicorn.url + path)[-1].event == "finished"
    assert "Traceback" not in uvicorn.log.read_text()


def test_client_that_never_reads(uvicorn: Server) -> None:
    """For a client that stops reading, the server keeps few events; it sends the last one later."""
    count, size = 400, 250_000
    read_all(uvicorn.url + uvicorn.start_task("large", 3, size, 0.002)["events"])
    before = resident_mebibytes(uvicorn)
    path = uvicorn.start_task("large", count, size, 0.002)["events"]
    with connect(uvicorn, path, receive_buffer=4096) as lazy:
        received = read_all(uvicorn.url + path)
        assert received[-1].event == "finished", "the lazy client delays another stream"
        grown = resident_mebibytes(uvicorn) - before
        content = read_to_end(lazy)
    assert grown < 0.4 * count * size / 2**20
    last = content.split(b"\n\n")[-2]
    assert b"event: finished" in last
    assert b'"status":"SUCCESSFUL"' in last
    assert content.count(b"event: ") < 20


@pytest.mark.parametrize("vanish", [close_with_rst, kill_while_stopped])
def test_client_that_vanishes(
    uvicorn: Server, gate: str, vanish: Callable[[Server, str], None]
) -> None:
    """The server closes the stream while the task runs, although it sends nothing to the client."""
    path = uvicorn.start_task("gated", gate)["events"]
    vanish(uvicorn, path)
    wait_until(lambda: open_streams(uvicorn) == 0, "the stream stays open")
    tasks.gates[gate].set()
    assert read_all(uvicorn.url + path)[-1].event == "finished"


def test_exit_with_500_open_streams(tmp_path: Path) -> None:
    """A server with 500 open streams ends in less than 3 s, because it runs no task."""
    with serve("uvicorn", tmp_path) as server, ExitStack() as stack:
        path = server.start_task("noop", backend="dummy")["events"]
        clients = [stack.enter_context(connect(server, path)) for _ in range(500)]
        for client in clients:
            read_until(client, b"event: enqueued")
        assert server.stop() < 3.0
        assert all(read_to_end(client) == b"" for client in clients)
        assert "Traceback" not in server.log.read_text()
