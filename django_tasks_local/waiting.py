"""Limit the time of one wait of a thread, because some systems limit it or delay Ctrl-C by it."""

import sys
import threading

# On Windows, Python cannot handle a signal such as Ctrl-C while the main thread waits for a lock.
# So the main thread waits there for this many seconds at a time. Other systems end the wait.
MAX_MAIN_WAIT = 0.1 if sys.platform == "win32" else threading.TIMEOUT_MAX


def limit_wait(seconds: float | None = None) -> float:
    """
    Return how long the calling thread may wait at once, if it wants to wait `seconds`.

    The caller waits in a loop, because the limit may end a wait before `seconds` have passed. None
    stands for a wait without end. A longer wait than TIMEOUT_MAX, which is 49 days on Windows,
    would raise OverflowError.
    """
    is_main = threading.current_thread() is threading.main_thread()
    limit = MAX_MAIN_WAIT if is_main else threading.TIMEOUT_MAX
    return limit if seconds is None else min(seconds, limit)
