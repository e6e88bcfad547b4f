"""Create virtual environments for the peers that the benchmarks compare with this package."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path


def make_environment(directory: Path, *requirements: str) -> Path:
    """Create an environment with these packages and the installed Django; return its Python."""
    environment = directory / "venv"
    python = environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    for command in (
        ["uv", "venv", "--quiet", "--python", sys.executable, str(environment)],
        [
            *("uv", "pip", "install", "--quiet", "--python", str(python)),
            *requirements,
            f"django=={version('django')}",
        ],
    ):
        subprocess.run(command, check=True)
    return python
