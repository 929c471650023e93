"""How many workers are right for a machine, or for a part of one."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from server.cpus import _quota, usable_cpus

ROOT = Path(__file__).parents[2]
CODE = "from server.cpus import usable_cpus; print(usable_cpus())"


def write(root: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize(
    ("membership", "files", "cpus"),
    [
        ("0::/\n", {"cpu.max": "250000 100000\n"}, 2.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("0::/a.slice/b.service\n", {"a.slice/b.service/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/cpu.max": "100000 100000\n", "a/b/cpu.max": "300000 100000\n"}, 1),
        ("0::/a/b\n", {"a/cpu.max": "max 100000\n", "a/b/cpu.max": "300000 100000\n"}, 3),
        ("0::/a/of/the/host\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("0::/../../b\n", {"cpu.max": "50000 100000\n"}, 0.5),
        ("1:name=systemd:/\n", {"cpu.max": "50000 100000\n"}, math.inf),
        (
            "3:cpuset:/\n2:cpu,cpuacct:/docker/x\n",
            {"cpu/docker/x/cpu.cfs_quota_us": "200000\n", "cpu/docker/x/cpu.cfs_period_us": "50000\n"},
            4,
        ),
        ("2:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("2:cpu:/of/the/host\n", {"cpu/cpu.cfs_quota_us": "70000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.7),
        ("", {}, math.inf),
    ],
)
def test_the_quota_is_the_least_of_all_groups_of_the_process(
    membership: str, files: dict[str, str], cpus: float, tmp_path: Path
) -> None:
    write(tmp_path, files)
    assert _quota(tmp_path, membership) == cpus


@pytest.mark.parametrize(("quota", "workers"), [("50000", 1), ("199999", 1), ("max", None)])
def test_a_quota_gives_whole_cpus_and_at_least_one(
    quota: str, workers: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, {"cpu.max": f"{quota} 100000\n", "membership": "0::/\n"})
    monkeypatch.setattr("server.cpus.CGROUPS", tmp_path)
    monkeypatch.setattr("server.cpus.MEMBERSHIP", tmp_path / "membership")
    assert usable_cpus() == (workers or len(os.sched_getaffinity(0)))


def test_a_process_that_is_held_to_one_cpu_has_one() -> None:
    first = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{first}}}); {CODE}"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
        timeout=40,
    ).stdout
    assert out == "1\n"
