"""A task gets no state of the database connections that an earlier task has used."""

from pathlib import Path

import pytest

from tests.support.backends import PROCESSES, THREADS
from tests.support.site import Site

# The alias "kept" keeps its connection, so that a later task gets the same one.
SETTINGS = """
DEBUG = True
LOGGING_CONFIG = None  # With DEBUG Django would log each query and each task.
DATABASES["default"] |= {{"CONN_MAX_AGE": 0, "ENGINE": "tenants"}}
DATABASES["kept"] = DATABASES["default"] | {{"CONN_MAX_AGE": None, "NAME": "kept.sqlite3"}}
TASKS["default"]["BACKEND"] = {backend!r}
"""
# A database backend with the methods and attribute of django-tenants, which needs PostgreSQL.
TENANTS = """
from django.db.backends.sqlite3 import base

class DatabaseWrapper(base.DatabaseWrapper):
    schema_name = "public"

    def set_schema(self, name):
        self.schema_name = name

    def set_schema_to_public(self):
        self.schema_name = "public"
"""
BODY = """
def of_connection(alias, *expressions):
    return run(evaluate, f"[(c := connections[{alias!r}]), {', '.join(expressions)}][1:]")

IDENTITY, QUERY = "id(c.connection)", "c.cursor().execute('SELECT 1') and None"
STATE = "len(c.execute_wrappers)", "c.force_debug_cursor", "c.schema_name"
for alias in ("default", "kept"):
    for leave in LEAVE:
        of_connection(alias, QUERY, leave)
        report(of_connection(alias, *STATE))
of_connection("kept", QUERY)
report([of_connection("kept", "len(c.queries)", QUERY)[0] for _ in range(3)])
report(len({of_connection("kept", QUERY, IDENTITY)[1] for _ in range(3)}))
"""


def leftovers(tmp_path: Path, backend: str, *leave: str) -> list[object]:
    """Run tasks that leave state in their connections, then tasks that return what they find."""
    site = Site(tmp_path, SETTINGS.format(backend=backend))
    (tmp_path / "tenants").mkdir()
    site.write("tenants/base.py", TENANTS)
    # A worker thread may still have a connection when the program ends.
    warnings = "error,ignore::ResourceWarning"
    return site.program(BODY.replace("LEAVE", repr(leave)), warnings=warnings)


@pytest.mark.parametrize("backend", [THREADS, PROCESSES])
def test_connection_state_leaks_into_the_next_task(tmp_path: Path, backend: str) -> None:
    """
    The wrappers, the debug cursor and the queries of a task are gone in the next task.

    Nevertheless a connection with CONN_MAX_AGE stays open if the task has left none of these.
    """
    left = leftovers(
        tmp_path,
        backend,
        "c.execute_wrappers.append(lambda execute, *args: execute(*args))",
        "setattr(c, 'force_debug_cursor', True)",
    )
    assert left == [[0, False, "public"]] * 4 + [[0, 0, 0], 1]


@pytest.mark.parametrize("backend", [THREADS, PROCESSES])
def test_schema_of_a_tenant_leaks_into_the_next_task(tmp_path: Path, backend: str) -> None:
    """
    django-tenants keeps the schema of a tenant in the wrapper of a connection.

    The wrapper of a closed connection is discarded; a connection that stays open is set to the
    public schema, for which the wrapper of django-tenants has a method.
    """
    left = leftovers(
        tmp_path,
        backend,
        "c.set_schema('a')",
    )
    assert left[:2] == [[0, False, "public"]] * 2
