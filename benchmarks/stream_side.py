"""
One side of benchmarks/streams.py: uvicorn in a process of its own, which does what stdin says.

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
    os.environ["DJANGO_SETTINGS_MODULE"] = "stream_settings"
    django.setup()

from django.tasks import task
from stream_project import SIDES, Side, events_path, make_event, work, working

# After so many turns of the event loop an event has gone out to every client, on every side.
TURNS = 5


class Publisher:
    """Carries out the commands. Runs in a thread of its own, as a task does."""

    def __init__(
        self, side: Side, listener: socket.socket, loop: asyncio.AbstractEventLoop
    ) -> None:
        self.side = side
        self.listener = listener
        self.loop = loop
        self.sequence = 1  # That of the state with which streams begin.

    def run(self) -> None:
        """Answer each command, until there are no more."""
        for line in sys.stdin:
            command, *arguments = json.loads(line)
            answer = getattr(self, command)(*arguments)
            print(json.dumps(answer), flush=True)

    def publish(self, events: int = 1) -> None:
        """Publish events back to back: each as soon as the one before has gone out."""
        for _ in range(events):
            self.sequence += 1
            self.side.publish(make_event(self.sequence))
            asyncio.run_coroutine_threadsafe(self._turns(), self.loop).result()

    def start_tasks(self, count: int) -> list[str]:
        """Start tasks that report, and return the path of each one's stream."""
        working.set()
        return [events_path(task(work).enqueue()) for _ in range(count)]

    def set_send_buffer(self, size: int) -> None:
        """Set how many bytes the system buffers for each connection from here on."""
        self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, size)

    def finish_tasks(self) -> None:
        """Have the tasks finish."""
        working.clear()

    def collect_garbage(self) -> None:
        """
        Leave in memory what is in use.

        A connection that breaks off leaves exceptions that refer to one another, and with many
        objects alive Python looks for such cycles seldom.
        """
        gc.collect()

    async def _turns(self) -> None:
        for _ in range(TURNS):
            await asyncio.sleep(0)


async def serve(side: Side) -> None:
    """Serve until the process is killed. The first line of stdout says where."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=4096)
    config = uvicorn.Config(
        side.application(),
        interface="asgi3",
        lifespan="off",
        log_level="warning",
        access_log=False,
        # What `pip install uvicorn` gives.
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
