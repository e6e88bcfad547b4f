"""The sizes of files and classes: a reader must be able to keep one in mind."""

import ast
from pathlib import Path

from tests.support.paths import ROOT

MAX_FILE = 350  # lines
MAX_CLASS = 250  # lines

FILES = [
    path
    for package in ("django_tasks_local", "django_tasks_local_sse")
    for path in sorted((ROOT / package).rglob("*.py"))
]


def lines_of_class(path: Path) -> dict[str, int]:
    """Return the number of lines of each class in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {
        node.name: (node.end_lineno or 0) - node.lineno + 1
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }


def test_no_file_is_long() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > MAX_FILE} == {}


def test_no_class_is_long() -> None:
    lengths = {name: length for path in FILES for name, length in lines_of_class(path).items()}
    assert len(lengths) > 50
    assert {name: length for name, length in lengths.items() if length > MAX_CLASS} == {}
