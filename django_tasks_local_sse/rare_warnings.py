"""Log records about a condition that many requests meet, at most one in a minute."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

from django_tasks_local.clocks import Clocks

if TYPE_CHECKING:
    from collections.abc import Hashable

    from django_tasks_local.logs import SafeLogger

INTERVAL = 60.0  # seconds


class RareWarnings:
    """Logs a warning unless one about the same subject was logged in the last INTERVAL."""

    def __init__(self, logger: SafeLogger) -> None:
        self._logger = logger
        self._lock = threading.Lock()  # guards _times
        self._times: dict[Hashable, float] = {}  # of the last warning, by subject

    def warn(self, subject: Hashable, message: str, *args: Any) -> None:
        """Log a warning; the number of subjects must be bounded. Called from any thread."""
        now = Clocks.monotonic()
        with self._lock:
            if now - self._times.get(subject, -INTERVAL) < INTERVAL:
                return
            self._times[subject] = now
        self._logger.warning(message, *args)
