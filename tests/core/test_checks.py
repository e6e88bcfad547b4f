"""The system checks of the backends, and the warning of enqueue() in an atomic block."""

import re
import threading
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from django.core.checks import CheckMessage, run_checks
from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.tasks import task_backends
from django.test import TestCase, override_settings

from tests.project import tasks
from tests.support.backends import PROCESSES, THREADS, settings_with
from tests.support.paths import ROOT
from tests.support.waiting import LIMIT, finished

DOCUMENTATION = (ROOT / "docs" / "databases.md").read_text()
IMMEDIATE = "django.tasks.backends.immediate.ImmediateBackend"
LOCMEM = "django.core.cache.backends.locmem.LocMemCache"


def problems(backend: str = THREADS, **params: Any) -> list[CheckMessage]:
    """Return what `manage.py check` reports with one task backend, whose alias is "default"."""
    with override_settings(TASKS={"default": {"BACKEND": backend, **params}}):
        return run_checks()


@pytest.mark.parametrize("backend", [THREADS, PROCESSES])
def test_nothing_is_reported_for_plain_settings(backend: str) -> None:
    assert problems(backend) == []


@pytest.mark.parametrize("workers", ["4", "1", "0", "", "many"])
def test_several_web_workers(monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    """More than one web worker is reported, for the backends of this package only."""
    monkeypatch.setenv("WEB_CONCURRENCY", workers)
    found = problems()
    assert [problem.id for problem in found] == ["django_tasks_local.W001"] * (workers == "4")
    assert all("announces 4 web workers" in problem.msg for problem in found)
    assert problems(IMMEDIATE) == []


@pytest.mark.parametrize("key", ["MAX_WORKERS", "timeout"])
def test_option_beside_options(key: str) -> None:
    [problem] = problems(PROCESSES, **{key: 4}, QUEUES=["default"], OPTIONS={})
    assert problem.id == "django_tasks_local.W002"
    assert f"{key!r} beside OPTIONS" in problem.msg
    assert problems(PROCESSES, SOMETHING_OF_A_SUBCLASS=4) == []


@pytest.mark.parametrize(
    ("key", "question"),
    [
        ("MAX_WORKER", "Did you mean 'MAX_WORKERS'? "),
        ("max_results", "Did you mean 'MAX_RESULTS'? "),
        ("SHUTDOWN_TIMEOUTS", "Did you mean 'SHUTDOWN_TIMEOUT'? "),
        ("COLOUR", ""),
        (7, ""),
    ],
)
def test_unknown_option_is_an_error_with_a_proposal(key: Any, question: str) -> None:
    expected = re.escape(f"has the unknown key {key!r}. {question}Valid keys: ")
    with pytest.raises(ImproperlyConfigured, match=expected):
        problems(OPTIONS={key: 2})


@pytest.mark.parametrize(
    ("mode", "workers", "ids"),
    [
        (None, 10, ["django_tasks_local.W003"]),
        ("deferred", 2, ["django_tasks_local.W003"]),
        (None, 1, []),
        ("IMMEDIATE", 10, []),
        ("exclusive", 10, []),
    ],
)
@pytest.mark.parametrize("backend", [THREADS, PROCESSES])
def test_deferred_transactions_in_sqlite(
    backend: str, mode: str | None, workers: int, ids: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite with deferred transactions is reported if several workers may write."""
    options = {} if mode is None else {"transaction_mode": mode}
    monkeypatch.setitem(connections["default"].settings_dict, "OPTIONS", options)
    found = problems(backend, OPTIONS={"MAX_WORKERS": workers})
    assert [problem.id for problem in found] == ids
    assert all("'IMMEDIATE'" in str(problem.hint) for problem in found)
    monkeypatch.setitem(connections["default"].settings_dict, "NAME", ":memory:")
    assert problems(backend, OPTIONS={"MAX_WORKERS": workers}) == []


def test_local_memory_cache_with_processes() -> None:
    """A cache in local memory is reported for processes, unless CACHES is Django's default."""
    with override_settings(CACHES={"default": {"BACKEND": LOCMEM}, "other": {"BACKEND": LOCMEM}}):
        [problem] = problems(PROCESSES)
        assert problem.id == "django_tasks_local.W004"
        assert "the cache 'default', 'other'" in problem.msg
        assert problems(THREADS) == []
    shared = {"BACKEND": "django.core.cache.backends.filebased.FileBasedCache", "LOCATION": "/tmp"}
    with override_settings(CACHES={"default": shared}):
        assert [problem.id for problem in problems(PROCESSES)] == []


# SQLite with several workers


@pytest.mark.django_db(transaction=True)
def test_concurrent_tasks_that_read_and_write_sqlite() -> None:
    """With the settings of docs/databases.md no task fails with "database is locked"."""
    namespace: dict[str, Any] = {"BASE_DIR": ROOT}
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCUMENTATION, re.MULTILINE | re.DOTALL)
    exec(next(block for block in blocks if block.startswith("# settings.py")), namespace)
    documented = namespace["DATABASES"]["default"]
    settings = connections["default"].settings_dict
    assert documented["OPTIONS"]["transaction_mode"] == settings["OPTIONS"]["transaction_mode"]
    assert documented["TEST"]["NAME"] == ROOT / "test.sqlite3"
    with settings_with(MAX_WORKERS=10):
        results = [tasks.add_user.enqueue(f"user {number}") for number in range(20)]
        assert [finished(result).errors for result in results] == [[]] * 20
        # Each task counted the users before it added one, and no two tasks did so concurrently.
        assert sorted(result.return_value for result in results) == list(range(20))


# enqueue() in an atomic block


@pytest.fixture
def debug() -> Iterator[None]:
    """Enable DEBUG after a first call of enqueue(), which has validated the task without it."""
    with settings_with():
        finished(tasks.noop.enqueue())
        with override_settings(DEBUG=True):
            yield


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("alias", ["threads", "processes"])
def test_enqueue_in_an_atomic_block(debug: None, alias: str) -> None:
    """With DEBUG the first enqueue() of each task in an atomic block warns of it."""
    noop, add = tasks.noop.using(backend=alias), tasks.add.using(backend=alias)
    results = [noop.enqueue()]
    with transaction.atomic():
        with pytest.warns(RuntimeWarning, match="noop was enqueued in an atomic block") as caught:
            results.append(noop.enqueue())
        [warning] = caught
        assert warning.filename == __file__
        assert "transaction.on_commit()" in str(warning.message)
        results.append(noop.enqueue())
        with transaction.atomic(), pytest.warns(RuntimeWarning, match="tasks.add was"):
            results.append(add.enqueue(1))
        transaction.on_commit(lambda: results.append(tasks.echo.using(backend=alias).enqueue()))
    assert len(results) == 5
    for result in results:
        finished(result)


@pytest.mark.django_db(transaction=True)
async def test_aenqueue_of_a_thread_in_an_atomic_block(debug: None) -> None:
    """Only an atomic block of the thread that runs enqueue() counts."""
    entered, leave = threading.Event(), threading.Event()

    def wait() -> None:
        with transaction.atomic():
            entered.set()
            leave.wait(LIMIT)
        connections.close_all()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert entered.wait(LIMIT)
        await tasks.noop.aenqueue()
    finally:
        leave.set()
        thread.join(LIMIT)


@pytest.mark.django_db(transaction=True)
def test_enqueue_in_an_atomic_block_without_debug() -> None:
    with settings_with(), transaction.atomic():
        finished(tasks.noop.enqueue())
        finished(tasks.noop.enqueue())


@pytest.mark.django_db
def test_enqueue_in_the_atomic_block_of_a_test_case(debug: None) -> None:
    """The atomic blocks of a TestCase, which pytest-django uses too, cause no warning."""
    connection: Any = connections["default"]
    assert connection.in_atomic_block
    assert all(block._from_testcase for block in connection.atomic_blocks)
    finished(tasks.noop.enqueue())
    with transaction.atomic(), pytest.warns(RuntimeWarning, match="atomic block"):
        result = tasks.noop.enqueue()
    finished(result)


@pytest.mark.django_db
def test_enqueue_on_commit_in_a_test_case(debug: None) -> None:
    with TestCase.captureOnCommitCallbacks(execute=True), warnings.catch_warnings():
        warnings.simplefilter("error")
        with transaction.atomic():
            transaction.on_commit(tasks.noop.enqueue)
    assert task_backends["default"].wait_until_idle(LIMIT) == []  # type: ignore[attr-defined]
