"""The hub's dictionaries while several threads change and copy them."""

import threading
from concurrent.futures import ThreadPoolExecutor

from django_tasks_local.hub import Hub
from tests.support.factories import event
from tests.support.waiting import LIMIT

READERS = 300  # so many that a copy takes longer than a change


def test_a_mailbox_is_asked_for_its_readers_while_they_change() -> None:
    """Any thread may call reads() while the mailbox's own thread adds and removes subscriptions."""
    hub = Hub()
    hub.publish(event("1", 1))
    topic = hub.find("1")
    assert topic is not None
    changes = threading.Semaphore(0)
    done = threading.Event()
    with hub.subscribe("1") as first:
        mailbox = first.mailbox
        assert mailbox is not None
        for _ in range(READERS):
            mailbox.add(hub.subscribe("1"))

        def change() -> None:
            other = hub.subscribe("1")
            while not done.is_set():
                mailbox.add(other)
                mailbox.remove(other)
                changes.release()

        with ThreadPoolExecutor(1) as threads:
            changing = threads.submit(change)
            try:
                answers = set()
                for _ in range(100):
                    assert changes.acquire(timeout=LIMIT)
                    answers |= {mailbox.reads(topic) for _ in range(100)}
            finally:
                done.set()
            changing.result()
    assert answers == {True}
