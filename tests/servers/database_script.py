"""
Run tasks that use PostgreSQL, for test_databases: `database_script.py BACKEND HOST USER TASKS`.

All aliases name one database; they differ in how Django keeps connections. The script prints each
result as a line with a title and facts in JSON. After the title "restart" it waits for a line on
stdin, which the test sends when it has restarted the database server.
"""

import asyncio
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
# Maximum size of psycopg's connection pool. After a restart of the server the pool checks one
# connection after 1 s, the next after 2 s, then 4 s: with the default size of four it would take
# 7 s to find that all are stale.
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
    """Return the settings of an alias; PostgreSQL lists its connections under the alias's name."""
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
    """Query the database of an alias through the ORM, in a sync task."""
    return ContentType.objects.using(alias).count()


@task
async def count_rows_async(alias: str) -> int:
    """Query the database of an alias through the ORM, in an async task."""
    row = await ContentType.objects.using(alias).aget(model="row")
    return row.pk


@task
def count_rows_in_own_loop(alias: str) -> int:
    """Query the database of an alias through the ORM, in an event loop of a sync task."""
    return asyncio.run(count_rows_async.func(alias))


@task
def hold_connections(gate: str, again: bool) -> None:
    """Connect to each alias, wait until the file `gate` exists, then with `again` query once."""
    for alias in MODES:
        count_rows.func(alias)
    report_progress(1)
    wait_for(gate)
    if again:
        count_rows.func("kept")


@task
def connections_in_use(alias: str) -> int:
    """Return how many connections of this process are checked out of the pool."""
    pool = connections[alias].pool
    deadline = time.monotonic() + LIMIT
    while True:
        stats = pool.get_stats()
        used: int = stats["pool_size"] - stats.get("pool_available", 0)
        # `pool_size` includes connections that the pool is still opening.
        if not used or time.monotonic() > deadline:
            return used
        time.sleep(0.01)


QUERIES = count_rows, count_rows_async, count_rows_in_own_loop


def outcomes(results: list[AnyResult]) -> Counter[str]:
    """Wait until all tasks have ended; count them by error path or status."""
    for result in results:
        with hub.subscribe(result.id) as subscription:
            while not subscription.ended:
                assert subscription.take(LIMIT), "the task takes too long"
        result.refresh()
    return Counter(
        result.errors[-1].exception_class_path if result.errors else str(result.status)
        for result in results
    )


def wait_for_reports(results: list[AnyResult]) -> None:
    """Wait until each task has reported progress."""
    for result in results:
        with hub.subscribe(result.id) as subscription:
            while events := subscription.take(LIMIT):
                if any(event.progress for event in events):
                    break
            assert not subscription.ended, "the task ended before it reported progress"


def server_connections() -> Counter[str]:
    """Return the number of connections on the server by alias."""
    with psycopg.connect(host=HOST, user=USER, dbname="postgres") as connection:
        rows = connection.execute(
            "SELECT application_name FROM pg_stat_activity "
            "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        ).fetchall()
    return Counter(name for (name,) in rows)


def wait_for_connections(limits: dict[str, int]) -> Counter[str]:
    """Return the connections on the server once each alias is within `limits`, or after LIMIT."""
    # PostgreSQL lists a connection for a short time after its client has closed it.
    deadline = time.monotonic() + LIMIT
    while (counts := server_connections()) - Counter(limits) and time.monotonic() < deadline:
        time.sleep(0.02)
    return counts


def report(title: str, facts: object = None) -> None:
    """Print a title and its facts as a line of JSON, which the test reads."""
    print(json.dumps([title, facts]), flush=True)  # noqa: T201


def run_tasks(times: int) -> dict[str, Counter[str]]:
    """Run `times` tasks of each kind on each alias; return their outcomes by alias."""
    results = {
        alias: [query.enqueue(alias) for _ in range(times) for query in QUERIES] for alias in MODES
    }
    return {alias: outcomes(of_alias) for alias, of_alias in results.items()}


def restart_server(directory: str, while_running: bool) -> Counter[str]:
    """Ask the test to restart the server while each worker holds a connection of each alias."""
    path = str(Path(directory) / f"gate-{while_running}")
    gate = Gate(path)
    results = [hold_connections.enqueue(path, again) for again in (False, while_running)]
    wait_for_reports(results)
    if not while_running:
        gate.set()
        outcomes(results)
    report("restart")
    sys.stdin.readline()
    gate.set()
    return outcomes(results)


def create_table() -> None:
    """Create the table that the tasks query, with one row, and close all connections."""
    with connections["closed"].schema_editor() as editor:
        editor.execute(f"DROP TABLE IF EXISTS {ContentType._meta.db_table}")
        editor.create_model(ContentType)
    ContentType.objects.using("closed").create(app_label="test", model="row")
    connections.close_all()


def main() -> None:
    """Run the steps in order and print their results, which test_databases.py checks."""
    create_table()
    report("before", wait_for_connections({}))
    report("many", run_tasks(int(TASKS) // (len(QUERIES) * len(MODES))))
    results = [connections_in_use.enqueue("pooled") for _ in range(2 * WORKERS)]
    outcomes(results)
    report("in use", [result.return_value for result in results])
    report(
        "after",
        wait_for_connections(
            {"kept": WORKERS, "kept for a time": WORKERS, "pooled": POOL * WORKERS}
        ),
    )
    with TemporaryDirectory() as directory:
        for while_running in (False, True):
            report("outlived", restart_server(directory, while_running))
            report("later", run_tasks(10))
    task_backends["default"].close()
    report(
        "closed", wait_for_connections({"pooled": POOL} if BACKEND == "ThreadPoolBackend" else {})
    )


if __name__ == "__main__":
    main()
