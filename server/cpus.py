"""How many CPUs this process may really use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")


def usable_cpus() -> int:
    """The CPUs of this process's affinity, or fewer where a cgroup's quota gives fewer; 1 or more.

    A container on a large machine sees all of its CPUs and may use but a few; as
    many workers as it sees would be throttled.
    """
    return max(1, int(min(_affinity(), _quota(CGROUP))))


def _affinity() -> int:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _quota(root: Path) -> float:
    """CPUs that the cgroup allows, version 2 or 1; infinite where it says nothing."""
    try:
        quota, period = (root / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (root / "cpu" / "cpu.cfs_quota_us").read_text()
            period = (root / "cpu" / "cpu.cfs_period_us").read_text()
        except OSError:
            return math.inf
    try:
        limit = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):  # `max`
        return math.inf
    return limit if limit > 0 else math.inf
