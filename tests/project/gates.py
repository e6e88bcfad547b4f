"""Gates: a task in any process blocks at a closed gate until the test opens it."""

import sys
import time
from pathlib import Path

if sys.platform == "win32":

    class Gate:
        """A file that set() deletes: Windows has no flock(), so wait_for() polls for the file."""

        def __init__(self, path: str) -> None:
            self._path = Path(path)
            self._path.touch()

        def set(self) -> None:
            """Open the gate permanently: delete the file."""
            self._path.unlink(missing_ok=True)

    def wait_for(gate: str) -> None:
        """
        Block until the test opens the Gate with this path.

        After the test, the fixture `no_leaks` opens all gates that are still closed.
        """
        while Path(gate).exists():
            time.sleep(0.005)

else:
    import fcntl

    class Gate:
        """A file that a test locks: wait_for() blocks in any process until set() unlocks it."""

        def __init__(self, path: str) -> None:
            # Closing the file releases the lock.
            self._file = Path(path).open("w", encoding="utf-8")  # noqa: SIM115
            fcntl.flock(self._file, fcntl.LOCK_EX)

        def set(self) -> None:
            """
            Open the gate permanently: unlock the file, so that no wait_for() blocks at this gate
            any longer.
            """
            self._file.close()

    def wait_for(gate: str) -> None:
        """
        Block until the test opens the Gate with this path.

        After the test, the fixture `no_leaks` opens all gates that are still closed.
        """
        with Path(gate).open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
