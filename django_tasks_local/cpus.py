"""Count the CPUs that this process may use, also in a container with a CPU limit."""

import math
import os
import sys
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def count_cpus() -> int:
    """Return the number of CPUs of this process, at most its container's limit, at least 1."""
    if sys.version_info >= (3, 13):
        count = os.process_cpu_count() or 1
    elif hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    limit = container_limit()
    return count if limit is None else max(1, min(count, math.ceil(limit)))


def container_limit(root: Path = CGROUPS, membership: Path = MEMBERSHIP) -> float | None:
    """
    Return the lowest CPU limit of this process's cgroup and its parents; None without a limit.

    `root` has the files of the control groups, and `membership` names the group of this process.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):  # This system has no control groups.
        return None
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        # Version 2 has one hierarchy, without names; version 1 has a folder for each controller.
        if not controllers:
            folder = root
        elif "cpu" in controllers.split(","):
            folder = next(
                (root / name for name in (controllers, "cpu") if (root / name).is_dir()), root
            )
        else:
            continue
        # In a container, `path` may be the host's, and the limits stand in the folder at the top.
        parts = [part for part in path.split("/") if part not in ("", "..")]
        lengths = range(len(parts) + 1)
        limits += [_limit_in(folder.joinpath(*parts[:length])) for length in lengths]
    return min((limit for limit in limits if limit is not None), default=None)


def _limit_in(group: Path) -> float | None:
    limit = parse_v2(_read(group / "cpu.max"))
    if limit is None:
        limit = parse_v1(_read(group / "cpu.cfs_quota_us"), _read(group / "cpu.cfs_period_us"))
    return limit


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return ""


def parse_v2(text: str) -> float | None:
    """Return the CPUs in the text of `cpu.max`, such as "150000 100000"; None without a limit."""
    quota, _, period = text.strip().partition(" ")
    return parse_v1(quota, period)


def parse_v1(quota: str, period: str) -> float | None:
    """Return the CPUs of a quota and a period in microseconds; None without a limit."""
    try:
        limit = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # "max", or the file does not exist.
        return None
    return limit if limit > 0 else None  # -1 means that there is no limit.
