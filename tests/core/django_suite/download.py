"""Download Django's tests of django.tasks: the sdist contains them, the wheel does not."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.support.programs import require

SECONDS = 100  # for the download; pip also builds the metadata of the sdist in this time


def download_suite(version: str) -> Path:
    """
    Return the folder that contains the package `tasks`, Django's tests of this version.

    The user's cache folder keeps the package. If the sdist cannot be downloaded, this function
    skips the test; in CI it fails the test.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "django-tasks-local" / f"django-{version}-tests"
    if not (folder / "tasks").is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as temporary:
            _download(version, Path(temporary))
            unpacked = _unpack(Path(temporary))
            try:
                unpacked.rename(folder)
            except OSError:
                # Another test process unpacked the same version concurrently.
                assert (folder / "tasks").is_dir()
    return folder


def _download(version: str, directory: Path) -> None:
    uv = require(os.environ.get("UV") or shutil.which("uv"), "uv")
    command = [
        *(uv, "run", "--no-project", "--python", sys.executable, "--with", "pip"),
        *("python", "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"),
        *("--dest", str(directory), f"django=={version}"),
    ]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=SECONDS)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        reason = (error.stderr or b"").decode(errors="replace")[-500:]
        message = f"Django's tests cannot be downloaded: {error}\n{reason}"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)


def _unpack(directory: Path) -> Path:
    [sdist] = directory.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        root = archive.getnames()[0].partition("/")[0]
        wanted = f"{root}/tests/tasks/"
        members = [member for member in archive if member.name.startswith(wanted)]
        archive.extractall(directory, members, filter="data")
    return directory / root / "tests"
