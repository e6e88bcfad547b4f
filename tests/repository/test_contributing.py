"""Tests that CONTRIBUTING.md names exactly the folders and commands that exist."""

import re
from pathlib import Path

import pytest

from tests.support import waiting
from tests.support.paths import ROOT

TEXT = (ROOT / "CONTRIBUTING.md").read_text()


@pytest.mark.parametrize("parent", ["django_tasks_local", "tests"])
def test_map_has_each_folder(parent: str) -> None:
    table = re.search(rf"^\| `{parent}` \|.*?\n\n", TEXT, re.MULTILINE | re.DOTALL)
    assert table is not None
    listed = re.findall(r"^\| `(\w+)/` \|", table[0], re.MULTILINE)
    folders = [path.parent.name for path in (ROOT / parent).glob("*/__init__.py")]
    assert sorted(listed) == sorted(folders)


def test_files_exist() -> None:
    names = set(re.findall(r"(?:tests|stress|benchmarks)/[\w/]+\.py|\.ci/run", TEXT))
    assert len(names) > 8
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_benchmarks_and_stress_programs_are_complete() -> None:
    def programs(folder: str) -> set[str]:
        files = (ROOT / folder).glob("*.py")
        return {path.name for path in files if "\nif __name__ == " in path.read_text()}

    commands = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL))
    assert programs("benchmarks") | programs("stress") <= {
        Path(name).name for name in re.findall(r"[\w/]+\.py", commands)
    }


def test_helpers_exist() -> None:
    section = TEXT.partition("## How a test waits")[2].partition("## ")[0]
    helpers = re.findall(r"`(\w+)\(", section)
    assert helpers == ["finished", "running", "wait_for_event", "wait_until"]
    for name in helpers:
        assert callable(getattr(waiting, name))


def test_markers_exist() -> None:
    markers = set(re.findall(r"\bnot (\w+)", TEXT.partition("## Folders")[0]))
    configured = (ROOT / "pyproject.toml").read_text()
    assert markers >= {"servers", "browser"}
    assert all(f'"{name}: ' in configured for name in ("servers", "browser"))
