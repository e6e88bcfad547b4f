"""Tests that modules import each other without cycles, downwards only and without side effects."""

import ast
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PACKAGES = ("django_tasks_local", "django_tasks_local_sse")

# The modules of django_tasks_local in layers, from the lowest. A module may import modules of lower
# layers only, whether at its top, inside a function or for type checking. The name of a folder
# stands for its `__init__`.
FLOORS = (
    ("clocks", "cpus", "logs"),
    (
        "conf",
        "events",
        "exceptions",
        "forking",
        "new_thread",
        "program_end",
        "signals",
        "waiting",
    ),
    ("aliases", "checks", "databases", "identifiers"),
    ("context", "serving"),
    ("publishing", "pubsub.latest", "progress.values", "progress.rate"),
    ("cancellation", "signal_handlers", "ticker", "progress.loops", "results"),
    ("pubsub.mailbox", "progress.reporter", "time_limit"),
    (
        "pubsub.subscription",
        "progress.tracking",
        "execution.daemon_threads",
        "execution.connections",
        "execution.normalizing",
        "execution.outcome",
    ),
    (
        "pubsub.facade",
        "progress",
        "execution.coroutines",
        "execution.sync_thread",
        "notifier",
    ),
    ("hub", "pubsub"),
    ("execution", "foreign", "lookup", "record", "shutdown"),
    (
        "pools.positions",
        "pools.queue",
        "pools.signals",
        "pools.statistics",
        "pools.store",
        "pools.unfinished",
    ),
    ("pools.completion",),
    ("pools.workers",),
    ("pools.base",),
    ("pools", "pools.threads"),
    ("processes", "processes.sender", "processes.task", "processes.settings"),
    (
        "processes.applying",
        "processes.facilities",
        "processes.fork_server",
        "processes.frames",
        "processes.loading",
        "processes.multiprocessing_limits",
        "processes.pace",
        "processes.tickets",
        "processes.worker_state",
    ),
    ("processes.lifeline", "processes.remote_errors"),
    ("processes.ending", "processes.wire"),
    ("processes.connection", "processes.receiver"),
    ("processes.child", "processes.worker_process"),
    ("processes.starting", "processes.assigning", "processes.loop"),
    ("processes.deadlines",),
    ("processes.crew",),
    ("processes.messages",),
    ("processes.dispatcher",),
    ("processes.pool",),
    ("backends",),
    ("apps", "operations", "testing"),
    ("",),
)


def modules(package: str) -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for path in (ROOT / package).rglob("*.py")
    }


TREES = {name: tree for package in PACKAGES for name, tree in modules(package).items()}
NAMES = {name.removesuffix(".__init__") for name in TREES}


def imports(name: str, tree: ast.Module) -> set[str]:
    """Return our modules that a module imports, at its top, in a function or for type checking."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            # `from base import name` imports the module base.name, or else a name defined in base.
            for alias in node.names:
                module = f"{base}.{alias.name}"
                found.add(module if module in NAMES else base)
    return (found & NAMES) - {name.removesuffix(".__init__")}


GRAPH = {name.removesuffix(".__init__"): imports(name, tree) for name, tree in TREES.items()}


def test_graph_contains_known_imports() -> None:
    assert "django_tasks_local.pools.threads" in GRAPH["django_tasks_local.backends"]
    assert "django_tasks_local.hub" in GRAPH["django_tasks_local_sse.streams"]


def test_no_cycle() -> None:
    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for imported in GRAPH.get(name, ()):
            visit(imported, (*path, name))

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_imports_point_down(floor: int) -> None:
    below = {full_name(name) for names in FLOORS[:floor] for name in names}
    for name in map(full_name, FLOORS[floor]):
        assert GRAPH[name] <= below, f"{name} imports {sorted(GRAPH[name] - below)}"


def reachable_from(name: str) -> set[str]:
    """Return a module and all our modules that it imports directly or indirectly."""
    reached: set[str] = set()
    todo = [name]
    while todo:
        module = todo.pop()
        reached.add(module)
        todo += GRAPH[module] - reached
    return reached


def full_name(name: str) -> str:
    return f"{PACKAGES[0]}.{name}".rstrip(".")


def test_each_module_of_the_core_has_a_floor() -> None:
    named = [full_name(name) for names in FLOORS for name in names]
    core = {name for name in GRAPH if name.split(".")[0] == PACKAGES[0]}
    assert sorted(named) == sorted(core)


def test_the_hub_knows_no_pool_and_no_task() -> None:
    assert reachable_from("django_tasks_local.hub") <= {
        full_name(name)
        for name in (
            "hub",
            "aliases",
            "clocks",
            "events",
            "forking",
            "logs",
            "pubsub",
            "pubsub.facade",
            "pubsub.mailbox",
            "pubsub.subscription",
            "pubsub.latest",
            "waiting",
        )
    }


def test_progress_does_not_know_the_hub() -> None:
    assert "django_tasks_local.hub" not in reachable_from("django_tasks_local.progress")


def test_core_imports_neither_sse_nor_django_eventstream() -> None:
    for name, tree in modules("django_tasks_local").items():
        for node in ast.walk(tree):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            text = " ".join([getattr(node, "module", None) or "", *names])
            assert "django_tasks_local_sse" not in text, name
            assert "eventstream" not in text, name


@pytest.mark.parametrize(
    "first",
    [
        "from django_tasks_local import hub",
        "from django_tasks_local.hub import hub",
        "import django_tasks_local.hub",
        "import django_tasks_local.pubsub.facade",
        "import django_tasks_local.foreign",
        "import importlib; importlib.import_module('django_tasks_local.hub')",
    ],
)
def test_hub_is_the_object_and_a_module(first: str) -> None:
    """Whichever import comes first, both documented imports return the same Hub object."""
    code = f"""
{first}
from django_tasks_local import hub
from django_tasks_local.hub import Hub, hub as same
import django_tasks_local.hub
assert isinstance(hub, Hub)
assert hub is same is django_tasks_local.hub
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=60)


def test_import_has_no_side_effect() -> None:
    """An import starts no thread or pool, sets no signal handler, and reads no settings."""
    code = """
import signal, sys, threading
before = signal.getsignal(signal.SIGTERM)
import django_tasks_local
from django.conf import settings
from django_tasks_local import pools
assert not settings.configured
assert threading.active_count() == 1
assert not pools._pools
assert signal.getsignal(signal.SIGTERM) is before
assert not [name for name in sys.modules if "eventstream" in name]
"""
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT, timeout=60)
