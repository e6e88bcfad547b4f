"""Task events on the channels of an application that uses django-eventstream already."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.test import override_settings

from django_tasks_local.events import TaskEvent
from django_tasks_local.hub import hub
from django_tasks_local_sse import bridge
from tests.project import tasks
from tests.support.servers import MANAGE, Server, environment, serve
from tests.support.sse_client import read_all
from tests.support.waiting import LIMIT, finished, wait_until

SETTINGS: dict[str, Any] = {
    "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channels.ChannelManager",
    "TASKS_SSE": {"BRIDGE": True, "EXPOSE_RESULTS": True},
}


SETUP = """
from django.contrib.auth.models import User
from django.core.management import call_command
call_command("migrate", verbosity=0)
User.objects.create_user("ada")
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """What the application's store was given."""
    path = tmp_path / "notes"
    path.touch()
    return path


@pytest.fixture
def server(tmp_path: Path, notes: Path) -> Iterator[Server]:
    """An application with a user `ada`, whose channel manager lets only users see tasks."""
    database = {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "db.sqlite3")}
    settings = {
        **SETTINGS,
        "DATABASES": {"default": database},
        "EVENTSTREAM_STORAGE_CLASS": "tests.project.channels.Store",
        "STORE_GATE": os.devnull,
        "STORE_NOTES": str(notes),
    }
    subprocess.run(
        [sys.executable, MANAGE, "shell", "--verbosity=0"],
        env=environment() | {"TEST_SETTINGS": json.dumps(settings)},
        input=SETUP,
        text=True,
        check=True,
    )
    with serve("uvicorn", tmp_path, settings=settings) as server:
        yield server


@pytest.mark.servers
def test_beside_the_applications_own_events(server: Server, gate: str, notes: Path) -> None:
    with httpx.Client(base_url=server.url, timeout=LIMIT) as ada:
        ada.get("/login/ada/")
        task = ada.get("/start/gated/", params={"args": json.dumps([gate])}).json()
        ada.get("/publish/news/hello/")
        tasks.gates[gate].set()
        own = read_all(server.url + task["events"], cookies=dict(ada.cookies))
    channel = f"task-{task['id']}"
    wait_until(lambda: '"finished"' in notes.read_text(), "the channel is not told the end")
    sent = [json.loads(line) for line in notes.read_text().splitlines()]
    assert ["news", {"text": "hello"}] in sent
    payloads = [payload for name, payload in sent if name == channel]
    assert payloads[-1]["result"] == gate
    # Our own stream says the same.
    assert own[-1].payload == payloads[-1]

    # Who has not logged in may read neither.
    url = f"{server.url}/stream/?channel=news&channel={channel}"
    assert "forbidden" in httpx.get(url, timeout=LIMIT).text
    events = server.url + server.start_task("noop")["events"]
    assert httpx.get(events, timeout=LIMIT).status_code == 403


@pytest.mark.servers
def test_nobody_waits_for_a_slow_store(tmp_path: Path, gate: str) -> None:
    """Tasks and streams go on; the store is given the latest when it is back."""
    notes = tmp_path / "notes"
    notes.touch()
    settings = {
        **SETTINGS,
        "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channels.EverybodysChannelManager",
        "EVENTSTREAM_STORAGE_CLASS": "tests.project.channels.Store",
        "STORE_GATE": gate,
        "STORE_NOTES": str(notes),
    }
    with serve("uvicorn", tmp_path, settings=settings) as server:
        first = server.start_task("noop")
        wait_until(notes.with_suffix(".asked").exists, "the bridge sends nothing")
        started = server.start_task("steps", 200, count=20)
        kinds = [message.event for message in read_all(server.url + started["events"])]
        assert kinds.count("finished") == 20
        assert notes.read_text() == "", "the store was not slow"
        tasks.gates[gate].set()
        wait_until(lambda: notes.read_text().count('"finished"') == 21, "the store misses events")
    sent = [json.loads(line) for line in notes.read_text().splitlines()]
    # One event waited for the store; of the rest it is given only the latest of each task.
    rest = [(channel, payload["kind"]) for channel, payload in sent[1:]]
    ids = started["ids"]
    if sent[0][1]["kind"] != "finished":
        ids = [first["id"], *ids]
    assert sorted(rest) == sorted((f"task-{id}", "finished") for id in ids)


@pytest.mark.servers
def test_a_store_that_is_down(tmp_path: Path) -> None:
    """What cannot be sent is tried again, and in the end dropped; both are logged with the id."""
    notes, up = tmp_path / "notes", tmp_path / "up"
    settings = {
        **SETTINGS,
        "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channels.EverybodysChannelManager",
        "EVENTSTREAM_STORAGE_CLASS": "tests.project.channels.BrokenStore",
        "STORE_GATE": os.devnull,
        "STORE_NOTES": str(notes),
        "STORE_IS_UP": str(up),
    }
    with serve("uvicorn", tmp_path, settings=settings) as server:
        first = server.start_task("noop")
        message = f"of task id={first['id']} could not be sent to its channel; "
        wait_until(lambda: message + "trying again" in server.log.read_text(), "nothing is logged")
        up.touch()
        wait_until(notes.exists, "it is not tried again")
        assert "the store is down" in server.log.read_text()


def test_in_the_end_an_event_is_dropped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge, "RETRY_DELAYS", (0.0, 0.0))
    event = _event()
    with override_settings(
        EVENTSTREAM_STORAGE_CLASS="tests.project.channels.BrokenStore", STORE_IS_UP="/no/such/file"
    ):
        bridge._send(event)
    logged = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert [message.rpartition("; ")[2] for message in logged] == [
        "trying again in 0 s.",
        "trying again in 0 s.",
        "it is dropped.",
    ]
    assert all(event.id in message for message in logged)


def _event() -> TaskEvent:
    event = hub.snapshot(finished(tasks.noop.enqueue()).id)
    assert event is not None
    return event


def test_it_is_refused_while_anyone_may_read(caplog: pytest.LogCaptureFixture) -> None:
    """Under a server too, which runs no system checks."""
    with override_settings(TASKS_SSE={"BRIDGE": True}):
        bridge.install()
    assert "is not acted on" in caplog.text
    _event()
    assert not bridge._state.started
