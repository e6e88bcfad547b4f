"""Channel managers and event stores of django-eventstream for settings of the tests."""

import itertools
import json
from pathlib import Path
from typing import Any

from django.conf import settings
from django_eventstream.channelmanager import DefaultChannelManager
from django_eventstream.event import Event
from django_eventstream.storage import StorageBase

from tests.project.tasks import wait_for


class ChannelManager(DefaultChannelManager):
    """
    A channel manager that lets logged-in users read all channels, and anonymous clients only
    `news`.
    """

    def can_read_channel(self, user: Any, channel: str) -> bool:
        return channel == "news" or user is not None


class PublicChannelManager(DefaultChannelManager):
    """A channel manager of an application that lets every client read every channel."""

    def can_read_channel(self, user: Any, channel: str) -> bool:
        return True


class Store(StorageBase):
    """
    An event store that blocks until the test opens the Gate STORE_GATE, then logs to STORE_NOTES.

    It appends each event as a line of JSON to STORE_NOTES. Before it blocks it creates the file
    STORE_NOTES with the suffix `.asked`, which shows the test that the store was called.
    """

    numbers = itertools.count(1)

    def append_event(self, channel: str, event_type: str, data: str) -> Event:
        Path(settings.STORE_NOTES).with_suffix(".asked").touch()
        wait_for(settings.STORE_GATE)
        with Path(settings.STORE_NOTES).open("a", encoding="utf-8") as notes:
            notes.write(json.dumps([channel, json.loads(data)]) + "\n")
        return Event(channel, event_type, data, id=next(self.numbers))

    def get_current_id(self, channel: str) -> int:
        return 0

    def get_events(self, channel: str, last_id: int, limit: int = 100) -> list[Event]:
        return []


class BrokenStore(Store):
    """An event store that raises ConnectionError until the test creates the file STORE_IS_UP."""

    def append_event(self, channel: str, event_type: str, data: str) -> Event:
        if not Path(settings.STORE_IS_UP).exists():
            raise ConnectionError("the store is down")
        return super().append_event(channel, event_type, data)
