"""
Run uvicorn with one side of benchmarks/streams.py, and carry out commands from stdin.

Each line of stdin is a command with its arguments in JSON, each line of stdout its answer.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import socket
import sys
import threading

import django
import uvicorn

if __name__ == "__main__":
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.sides.stream_settings"
    django.setup()

from django.tasks import task

from benchmarks.sides.stream_project import (
    SIDES,
    Side,
    events_path,
    make_event,
    work,
    working,
)

# After this number of turns of the event loop every side has written an event to all its clients.
TURNS = 5


class Publisher:
    """Carries out commands in a thread of its own, because tasks also publish from a thread."""

    def __init__(
        self, side: Side, listener: socket.socket, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.side = side
        self.listener = listener
        self.loop = loop
        self.sequence = 1  # The sequence of the last published event; streams begin with 1.

    def run(self) -> None:
        """Read commands from stdin and print their answers until stdin ends."""
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            answer = getattr(self, command)(*arguments)
            print(json.dumps(answer), flush=True)

    def publish(self, events: int = 1) -> None:
        """Publish events, each as soon as the server has written the one before to all clients."""
        for _ in range(events):
            self.sequence += 1
            self.side.publish(make_event(self.sequence))
            asyncio.run_coroutine_threadsafe(self._turns(), self.loop).result()

    def start_tasks(self, count: int) -> list[str]:
        """Start tasks that report progress; return the URL of the stream of each."""
        working.set()
        return [events_path(task(work).enqueue()) for _ in range(count)]

    def set_send_buffer(self, size: int) -> None:
        """Set the size of the send buffer of all connections that the server accepts later."""
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    def finish_tasks(self) -> None:
        """Clear `working`, at which the tasks of start_tasks() return."""
        working.clear()

    def collect_garbage(self) -> None:
        """
        Run the garbage collector, so that the memory in use is comparable over time.

        After a broken connection exceptions stay alive in reference cycles, and Python collects
        cycles rarely if many objects are alive.
        """
        gc.collect()

    async def _turns(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)


async def serve(side: Side) -> None:
    """Print the port and the stream's path, then serve until the process is killed."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    config = uvicorn.Config(
        side.application(),
        interface="asgi3",
        lifespan="off",
        log_level="warning",
        access_log=False,
        # `pip install uvicorn` installs neither uvloop nor httptools, so use uvicorn without them.
        loop="asyncio",
        http="h11",
    )
    publisher = Publisher(side, listener, asyncio.get_running_loop())
    threading.Thread(target=publisher.run, name="publisher", daemon=True).start()
    print(json.dumps([listener.getsockname()[1], side.path]), flush=True)
    await uvicorn.Server(config).serve(sockets=[listener])


if __name__ == "__main__":
    chosen = SIDES[sys.argv[1]]
    chosen.prepare()
    asyncio.run(serve(chosen))
