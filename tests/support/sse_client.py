"""A client for server-sent events that parses streams as the WHATWG HTML standard defines."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx

from tests.project.tasks import LIMIT


@dataclass
class Message:
    """
    One block of an event stream: an event, or a block without data (only comments and fields).

    Comments that are not followed by a field belong to the next event.
    """

    event: str = "message"
    data: list[str] = field(default_factory=list)
    last_event_id: str = ""
    retry: int | None = None
    comments: int = 0

    @property
    def payload(self) -> Any:
        return json.loads("\n".join(self.data))


def messages(lines: Iterator[str]) -> Iterator[Message]:
    """
    Parse the lines of a stream, as the HTML standard, section 9.2.6, "Interpreting an event
    stream".
    """
    message, last_event_id = Message(), ""
    for line in lines:
        if line == "":
            message.last_event_id = last_event_id
            yield message
            message = Message()
            continue
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "":
                message.comments += 1
            case "event":
                message.event = value
            case "data":
                message.data.append(value)
            case "id":
                last_event_id = value
            case "retry":
                message.retry = int(value)


@contextmanager
def stream(url: str, **kwargs: Any) -> Iterator[Iterator[Message]]:
    """Open a stream, with POST if there is `data`, and check its status and content type."""
    method = "POST" if "data" in kwargs else "GET"
    with httpx.Client(timeout=LIMIT) as client, client.stream(method, url, **kwargs) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["Content-Type"] == "text/event-stream"
        yield messages(response.iter_lines())


def event_source(url: str) -> Iterator[Message]:
    """
    Yield the messages of a stream and reconnect, as a browser's EventSource does, until status 204.

    The first message of each connection has `retry`. Raises httpx.HTTPStatusError for any other
    status.
    Source: HTML, section 9.2.3, "Processing model".
    """
    retry, last_event_id = 1000, ""
    with httpx.Client(timeout=LIMIT) as client:
        while True:
            headers = {"Last-Event-ID": last_event_id} if last_event_id else {}
            with client.stream("GET", url, headers=headers) as response:
                if response.status_code == 204:
                    return
                response.raise_for_status()
                for message in messages(response.iter_lines()):
                    retry = message.retry or retry
                    last_event_id = message.last_event_id or last_event_id
                    assert message.data, "clients take a block without data for an event"
                    yield message
            time.sleep(retry / 1000)


def read_all(url: str, **kwargs: Any) -> list[Message]:
    """Read a stream until the server ends it, and return the messages with data."""
    with stream(url, **kwargs) as received:
        return [message for message in received if message.data]
