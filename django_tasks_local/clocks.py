"""
Keep the real clocks for the time limits of this package.

freezegun replaces time.monotonic(), and each global variable of a module that refers to it, while
a test has frozen the time. A wait with a time limit would never end. Timestamps are read with
Django's timezone.now(), so a test may change them.
"""

from __future__ import annotations

import time


class Clocks:
    """Has the clocks as attributes of a class, which freezegun does not replace."""

    monotonic = staticmethod(time.monotonic)
    perf_counter = staticmethod(time.perf_counter)
