"""Tests of the bridge, which sends task events to django-eventstream channels."""

import json
import os
import subprocess
import sys
import threading
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


REAL_THREAD = threading.Thread

SETUP = """
from django.contrib.auth.models import User
from django.core.management import call_command
call_command("migrate", verbosity=0)
User.objects.create_user("ada")
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    """Create the file to which tests.project.channels.Store writes each event that it receives."""
    path = tmp_path / "notes"
    path.touch()
    return path


@pytest.fixture
def bridge_server(tmp_path: Path, notes: Path) -> Iterator[Server]:
    """Start a server with the user `ada`; only logged-in users may read the channels of tasks."""
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
def test_channels_of_application_and_tasks(bridge_server: Server, gate: str, notes: Path) -> None:
    with httpx.Client(base_url=bridge_server.url, timeout=LIMIT) as ada:
        ada.get("/login/ada/")
        task = ada.get("/start/gated/", params={"args": json.dumps([gate])}).json()
        ada.get("/publish/news/hello/")
        tasks.gates[gate].set()
        own = read_all(bridge_server.url + task["events"], cookies=dict(ada.cookies))
    channel = f"task-{task['id']}"
    wait_until(
        lambda: '"finished"' in notes.read_text(encoding="utf-8"),
        "the channel does not receive the end",
    )
    sent = [json.loads(line) for line in notes.read_text(encoding="utf-8").splitlines()]
    assert ["news", {"text": "hello"}] in sent
    payloads = [payload for name, payload in sent if name == channel]
    assert payloads[-1]["result"] == gate
    # The task's own stream sends the same payload.
    assert own[-1].payload == payloads[-1]

    # A client without a login may read neither the channel nor the stream.
    url = f"{bridge_server.url}/stream/?channel=news&channel={channel}"
    assert "forbidden" in httpx.get(url, timeout=LIMIT).text
    events = bridge_server.url + bridge_server.start_task("noop")["events"]
    assert httpx.get(events, timeout=LIMIT).status_code == 403


@pytest.mark.servers
def test_slow_store_delays_no_task(tmp_path: Path, gate: str) -> None:
    """Tasks and streams continue while the store blocks; then it receives the latest events."""
    notes = tmp_path / "notes"
    notes.touch()
    settings = {
        **SETTINGS,
        "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channels.PublicChannelManager",
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
    # The first event blocked in the store. While it did, the bridge kept only the latest event of
    # each task, so the store receives one more event for each.
    rest = [(channel, payload["kind"]) for channel, payload in sent[1:]]
    ids = started["ids"]
    if sent[0][1]["kind"] != "finished":
        ids = [first["id"], *ids]
    assert sorted(rest) == sorted((f"task-{id}", "finished") for id in ids)


@pytest.mark.servers
def test_store_that_fails_is_retried(tmp_path: Path) -> None:
    """The bridge retries an event that the store rejects, and logs it with the task's id."""
    notes, up = tmp_path / "notes", tmp_path / "up"
    settings = {
        **SETTINGS,
        "EVENTSTREAM_CHANNELMANAGER_CLASS": "tests.project.channels.PublicChannelManager",
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
        wait_until(notes.exists, "the bridge does not retry")
        assert "the store is down" in server.log.read_text()


def test_event_is_dropped_after_all_retries(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bridge, "RETRY_DELAYS", (0.0, 0.0))
    event = last_event()
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


def last_event() -> TaskEvent:
    event = hub.snapshot(finished(tasks.noop.enqueue()).id)
    assert event is not None
    return event


def test_bridge_requires_channel_manager(caplog: pytest.LogCaptureFixture) -> None:
    """install() checks for a channel manager itself, because servers run no system checks."""
    with override_settings(TASKS_SSE={"BRIDGE": True}):
        bridge.install()
    assert "is ignored" in caplog.text
    last_event()
    assert not bridge._state.started


def test_finalizer_may_enqueue_while_the_bridge_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[bridge._State] = []

    class Thread:
        def __init__(self, **kwargs: Any) -> None:
            pass

        def start(self) -> None:
            started.append(bridge._state)
            # A finalizer that enqueues a task calls _start() in the thread that is already in it.
            bridge._start()

    monkeypatch.setattr(bridge, "_state", bridge._State())
    monkeypatch.setattr(bridge.threading, "Thread", Thread)
    caller = REAL_THREAD(target=bridge._start, daemon=True)
    caller.start()
    caller.join(LIMIT)
    assert not caller.is_alive(), "_start() waits for a lock that its own thread holds"
    assert started == [bridge._state]
    assert bridge._state.started
