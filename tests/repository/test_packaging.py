"""Tests that wheel and sdist install in a clean environment and contain the right files."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.programs import require

FIND_STATIC = """
from django.conf import settings
settings.configure(
    SECRET_KEY="x", STATIC_URL="static/",
    INSTALLED_APPS=["django.contrib.staticfiles", "django_eventstream", "django_tasks_local_sse"],
    TASKS={"default": {"BACKEND": "django_tasks_local.ThreadPoolBackend"}},
    TEMPLATES=[{"BACKEND": "django.template.backends.django.DjangoTemplates", "APP_DIRS": True}],
)
import django
django.setup()
from django.contrib.staticfiles import finders
from django.core.management import call_command
from django.template.loader import get_template
call_command("check")
for name in ("task-progress.js", "task-progress.css"):
    found = finders.find("django_tasks_local_sse/" + name)
    assert found, name
get_template("django_tasks_local_sse/task_progress.html")
import django_tasks_local
print(django_tasks_local.__file__)
"""


def run_command(*command: str | Path, cwd: Path = ROOT) -> str:
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def uv() -> str:
    # `uv run` sets the environment variable UV to the path of uv.
    return require(os.environ.get("UV") or shutil.which("uv"), "uv")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dist")
    run_command(uv(), "build", "--out-dir", path)
    return path


@pytest.mark.timeout(180)
@pytest.mark.parametrize("pattern", ["*.whl", "*.tar.gz"])
def test_installation_in_clean_environment(dist: Path, tmp_path: Path, pattern: str) -> None:
    [package] = dist.glob(pattern)
    run_command(uv(), "venv", "--python", sys.executable, tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    run_command(uv(), "pip", "install", "--python", python, f"{package}[sse]")
    assert str(tmp_path) in run_command(python, "-c", FIND_STATIC, cwd=tmp_path)


@pytest.mark.timeout(180)
def test_contents(dist: Path) -> None:
    [wheel] = dist.glob("*.whl")
    [sdist] = dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {
        "django_tasks_local",
        "django_tasks_local_sse",
    }
    for package in ("django_tasks_local", "django_tasks_local_sse"):
        assert f"{package}/py.typed" in names
    assert "django_tasks_local_sse/static/django_tasks_local_sse/task-progress.js" in names
    assert not [name for name in names if "__pycache__" in name or "/test_" in name]
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert "static" not in names
    assert {
        "example.py",
        "README.md",
        "LICENSE",
        "tests/core/pubsub/test_hub.py",
        "pyproject.toml",
    } <= names


@pytest.mark.timeout(180)
def test_checkout_without_symbolic_links_builds_the_same_files(tmp_path: Path) -> None:
    """On Windows, git may write a symbolic link as a file that contains the path of its target."""
    git = require(shutil.which("git"), "git")
    require("git" if (ROOT / ".git").exists() else None, "a git checkout of this project")
    contents = []
    for symlinks in ("true", "false"):
        checkout, dist = tmp_path / f"checkout-{symlinks}", tmp_path / f"dist-{symlinks}"
        run_command(
            git, "clone", "--quiet", "--config", f"core.symlinks={symlinks}", ROOT, checkout
        )
        assert (checkout / "static").is_symlink() is (symlinks == "true")
        run_command(uv(), "build", "--out-dir", dist, cwd=checkout)
        contents.append(files_of(dist))
    assert contents[0] == contents[1]


def files_of(dist: Path) -> dict[str, bytes]:
    """Return the content of each file in the wheel and in the sdist."""
    [wheel] = dist.glob("*.whl")
    [sdist] = dist.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        files = {f"wheel:{name}": archive.read(name) for name in archive.namelist()}
    with tarfile.open(sdist) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member)
            files[f"sdist:{member.name}"] = b"" if file is None else file.read()
    return files
