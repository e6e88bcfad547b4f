"""
What test_databases runs: `database_script.py BACKEND HOST USER TASKS`.

Each alias is the same database, reached in another way. Each line on stdout is a title and facts,
as JSON. After the title "restart" the script waits for a line on stdin.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import django
import psycopg
from django.conf import settings

WORKERS = 2
# Its connections are checked one a second, then one in two seconds, and so on: a pool of the usual
# four would need seven seconds to see that all are stale.
POOL = 2
MODES: dict[str, dict[str, Any]] = {
    "closed": {"CONN_MAX_AGE": 0},
    "kept for a time": {"CONN_MAX_AGE": 60},
    "kept": {"CONN_MAX_AGE": None},
    "pooled": {
        "OPTIONS": {"pool": {"min_size": 1, "max_size": POOL}},
        "CONN_HEALTH_CHECKS": True,
    },
}
BACKEND, HOST, USER, TASKS = sys.argv[1:5]


def database(alias: str, mode: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of an alias; the server will know it by its name."""
    options = {**mode.get("OPTIONS", {}), "application_name": alias}
    server = {"ENGINE": "django.db.backends.postgresql", "HOST": HOST, "USER": USER}
    return {**server, "NAME": "postgres", **mode, "OPTIONS": options}


settings.configure(
    USE_TZ=True,
    INSTALLED_APPS=["django.contrib.contenttypes"],
    DATABASES={alias: database(alias, mode) for alias, mode in MODES.items()} | {"default": {}},
    TASKS={
        "default": {
            "BACKEND": f"django_tasks_local.{BACKEND}",
            "OPTIONS": {"MAX_WORKERS": WORKERS, "MAX_RESULTS": 100_000},
        }
    },
)
django.setup()

from django.contrib.contenttypes.models import ContentType  # noqa: E402
from django.db import connections  # noqa: E402
from django.tasks import TaskResult, task, task_backends  # noqa: E402

from django_tasks_local import report_progress  # noqa: E402
from django_tasks_local.hub import hub  # noqa: E402
from tests.project.tasks import LIMIT, Gate, wait_for  # noqa: E402

type AnyResult = TaskResult[Any, Any]


@task
def count_rows(alias: str) -> int:
    """Use the ORM."""
    return ContentType.objects.using(alias).count()


@task
async def count_rows_async(alias: str) -> int:
    """Use the ORM in a coroutine."""
    row = await ContentType.objects.using(alias).aget(model="row")
    return row.pk


@task
def outlive(gate: str, again: bool) -> None:
    """Connect to each alias, wait for the test, and perhaps use the connections once more."""
    for alias in MODES:
        count_rows.func(alias)
    report_progress(1)
    wait_for(gate)
    if again:
        count_rows.func("kept")


@task
def in_use(alias: str) -> int:
    """Return how many connections of this process are out of the pool."""
    pool = connections[alias].pool
    deadline = time.monotonic() + LIMIT
    while True:
        stats = pool.get_stats()
        used: int = stats["pool_size"] - stats.get("pool_available", 0)
        # It counts those that it is about to open.
        if not used or time.monotonic() > deadline:
            return used
        time.sleep(0.01)


def finished(results: list[AnyResult]) -> Counter[str]:
    """Wait for the ends, and count them."""
    for result in results:
        with hub.subscribe(result.id) as subscription:
            while not subscription.ended:
                assert subscription.take(LIMIT), "it takes too long"
        result.refresh()
    return Counter(
        result.errors[-1].exception_class_path if result.errors else str(result.status)
        for result in results
    )


def running(results: list[AnyResult]) -> None:
    """Wait until all have reported."""
    for result in results:
        with hub.subscribe(result.id) as subscription:
            while events := subscription.take(LIMIT):
                if any(event.progress for event in events):
                    break
            assert not subscription.ended, "it has not waited"


def on_server() -> Counter[str]:
    """Return how many connections the server has, by the alias."""
    with psycopg.connect(host=HOST, user=USER, dbname="postgres") as connection:
        rows = connection.execute(
            "SELECT application_name FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchall()
    return Counter(name for (name,) in rows)


def connected(most: dict[str, int]) -> Counter[str]:
    """Return how many there are on the server, once they are no more than `most`, or too late."""
    # The server notices a little later that a client has gone.
    deadline = time.monotonic() + LIMIT
    while (counts := on_server()) - Counter(most) and time.monotonic() < deadline:
        time.sleep(0.02)
    return counts


def say(title: str, facts: object = None) -> None:
    """Tell the test."""
    print(json.dumps([title, facts]), flush=True)  # noqa: T201


def enqueue(times: int) -> dict[str, Counter[str]]:
    """Run so many tasks of each kind on each alias, and return how they ended, by the alias."""
    results = {
        alias: [
            query.enqueue(alias) for _ in range(times) for query in (count_rows, count_rows_async)
        ]
        for alias in MODES
    }
    return {alias: finished(of_alias) for alias, of_alias in results.items()}


def outlive_restart(directory: str, while_running: bool) -> Counter[str]:
    """Have the server restarted when each worker has a connection by each alias."""
    path = str(Path(directory) / f"gate-{while_running}")
    gate = Gate(path)
    results = [outlive.enqueue(path, again) for again in (False, while_running)]
    running(results)
    if not while_running:
        gate.set()
        finished(results)
    say("restart")
    sys.stdin.readline()
    gate.set()
    return finished(results)


def create_row() -> None:
    """Make the table that the tasks query, and leave no connection."""
    with connections["closed"].schema_editor() as editor:
        editor.execute(f"DROP TABLE IF EXISTS {ContentType._meta.db_table}")
        editor.create_model(ContentType)
    ContentType.objects.using("closed").create(app_label="test", model="row")
    connections.close_all()


def main() -> None:
    """Play the scenes, one after the other."""
    create_row()
    say("before", connected({}))
    say("many", enqueue(int(TASKS) // (2 * len(MODES))))
    results = [in_use.enqueue("pooled") for _ in range(2 * WORKERS)]
    finished(results)
    say("in use", [result.return_value for result in results])
    say("after", connected({"kept": WORKERS, "kept for a time": WORKERS, "pooled": POOL * WORKERS}))
    with TemporaryDirectory() as directory:
        for while_running in (False, True):
            say("outlived", outlive_restart(directory, while_running))
            say("later", enqueue(10))
    task_backends["default"].close()
    say("closed", connected({"pooled": POOL} if BACKEND == "ThreadPoolBackend" else {}))


if __name__ == "__main__":
    main()
