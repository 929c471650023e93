"""How many CPUs this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path, PurePosixPath

CGROUPS = Path("/sys/fs/cgroup")
"""Where control groups are mounted."""

MEMBERSHIP = Path("/proc/self/cgroup")
"""In which of them this process is."""


def usable_cpus() -> int:
    """The CPUs of this process's affinity, or fewer where a cgroup's quota gives fewer; 1 or more.

    A container on a large machine sees all of its CPUs and may use but a few; as
    many workers as it sees would be throttled. Of a fraction nothing is taken:
    a quota of 2.5 CPUs is good for 2.
    """
    try:
        membership = MEMBERSHIP.read_text()
    except OSError:  # no Linux
        membership = ""
    return max(1, int(min(_affinity(), _quota(CGROUPS, membership))))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(root: Path, membership: str) -> float:
    """The CPUs that the cgroups of a process allow together, version 2 or 1; infinite where they say nothing.

    A group has the quotas of all groups above it, too. `membership` has a line
    `id:controllers:path` for each hierarchy; that of version 2 has no
    controllers. Inside a container, the path may be that of the host, of which
    only the end of the way, the root, is to be seen.
    """
    limit = math.inf
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            read, mount = _limit_of_version_2, root
        elif "cpu" in controllers.split(","):
            read, mount = _limit_of_version_1, root / "cpu"
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for level in (group, *group.parents):
            limit = min(limit, read(mount / level))
    return limit


def _limit_of_version_2(group: Path) -> float:
    try:
        quota, period = (group / "cpu.max").read_text().split()
        return int(quota) / int(period)
    except (OSError, ValueError):  # not told here, or `max`
        return math.inf


def _limit_of_version_1(group: Path) -> float:
    try:
        quota = int((group / "cpu.cfs_quota_us").read_text())
        period = int((group / "cpu.cfs_period_us").read_text())
    except (OSError, ValueError):
        return math.inf
    return quota / period if quota > 0 else math.inf  # -1 is no limit
