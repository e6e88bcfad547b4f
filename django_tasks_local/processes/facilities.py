"""
Name the facilities of the system that Windows lacks, and that worker processes use elsewhere.

A test may set one of these to False on another system, to run the code for Windows there.
"""

import os
import sys

# Whether a selector accepts the sentinel of a process, and not only sockets.
SELECTS_SENTINELS = sys.platform != "win32"
# Whether a process can read a pipe without waiting, as tickets require.
HAS_TICKETS = sys.platform != "win32"
# Whether a process can handle SIGTERM. On Windows, Process.terminate() ends it at once.
HANDLES_SIGTERM = sys.platform != "win32"
# Whether a process can lead a group of processes, which one call kills together.
HAS_GROUPS = hasattr(os, "killpg")
