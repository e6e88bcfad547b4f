"""The direction of imports: no cycle, no backward arrow, nothing done at import."""

import ast
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

PACKAGES = ("django_tasks_local", "django_tasks_local_sse")

# What a module may import of ours, at its top or inside a function. A module that is not named
# may import everything that does not import it.
NOTHING_OF_OURS = {"conf", "events", "exceptions"}


def modules(package: str) -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text())
        for path in (ROOT / package).rglob("*.py")
    }


def imports(name: str, tree: ast.Module) -> set[str]:
    """Return the modules of ours that a module imports, wherever in it the statement stands."""
    known = {**modules(PACKAGES[0]), **modules(PACKAGES[1])}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*parent, *([node.module] if node.module else [])])
            found.add(base)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return {module for module in found if module in known and module != name}


GRAPH = {
    name: imports(name, tree)
    for package in PACKAGES
    for name, tree in modules(package).items()
    if not name.endswith("__init__")
}


def test_the_walk_finds_imports() -> None:
    assert "django_tasks_local.threads" in GRAPH["django_tasks_local.backends"]
    assert "django_tasks_local.hub" in GRAPH["django_tasks_local_sse.streams"]


def test_there_is_no_cycle() -> None:
    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        for imported in GRAPH.get(name, ()):
            visit(imported, (*path, name))

    for name in GRAPH:
        visit(name, ())


@pytest.mark.parametrize("name", sorted(NOTHING_OF_OURS))
def test_what_imports_nothing_of_ours(name: str) -> None:
    assert GRAPH[f"django_tasks_local.{name}"] == set()


def test_the_hub_imports_events_only() -> None:
    assert GRAPH["django_tasks_local.hub"] == {"django_tasks_local.events"}


def test_progress_does_not_know_the_hub() -> None:
    assert "django_tasks_local.hub" not in GRAPH["django_tasks_local.progress"]


def test_the_core_knows_neither_the_companion_nor_django_eventstream() -> None:
    for name, tree in modules("django_tasks_local").items():
        for node in ast.walk(tree):
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            text = " ".join([getattr(node, "module", None) or "", *names])
            assert "django_tasks_local_sse" not in text, name
            assert "eventstream" not in text, name


def test_importing_does_nothing() -> None:
    """No thread, no pool, no signal handler, no settings read, no django-eventstream."""
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
