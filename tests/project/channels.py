"""Channel managers and stores that an application configures for django-eventstream."""

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
    """Everyone may read the channel `news`; only users may read the channels of tasks."""

    def can_read_channel(self, user: Any, channel: str) -> bool:
        return channel == "news" or user is not None


class PublicChannelManager(DefaultChannelManager):
    """Everyone may read every channel, by the application's own decision."""

    def can_read_channel(self, user: Any, channel: str) -> bool:
        return True


class Store(StorageBase):
    """
    A store that waits until the file STORE_GATE exists, then writes the event to STORE_NOTES.

    Before its first wait it creates the file STORE_NOTES with the suffix `.asked`.
    """

    numbers = itertools.count(1)

    def append_event(self, channel: str, event_type: str, data: str) -> Event:
        Path(settings.STORE_NOTES).with_suffix(".asked").touch()
        wait_for(settings.STORE_GATE)
        with Path(settings.STORE_NOTES).open("a") as notes:
            notes.write(json.dumps([channel, json.loads(data)]) + "\n")
        return Event(channel, event_type, data, id=next(self.numbers))

    def get_current_id(self, channel: str) -> int:
        return 0

    def get_events(self, channel: str, last_id: int, limit: int = 100) -> list[Event]:
        return []


class BrokenStore(Store):
    """A store that fails until the file STORE_IS_UP exists."""

    def append_event(self, channel: str, event_type: str, data: str) -> Event:
        if not Path(settings.STORE_IS_UP).exists():
            raise ConnectionError("the store is down")
        return super().append_event(channel, event_type, data)
