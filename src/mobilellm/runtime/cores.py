"""How many threads decode a token best, from what the system says of its cores.

A token is bound by memory, which a few cores use up, and its threads meet some 150 times, waiting by looking:
one that has no core of its own, or a slow one, holds up the others each time. So a thread for every core that
is fast and that this process may have all to itself, and four at most.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

MOST_DEFAULT_THREADS = 4
_FAST = 0.8
"""A core with less of the fastest speed is of a slower kind: small ones have a half to three quarters."""


def default_threads(root: Path = Path("/")) -> int:
    """Fast cores this process may use, at most four. Hyper-threads of a core count once; of a container's or
    service's share of processor time (cgroup) only whole processors count, and one in any case.

    `root` is where /sys and /proc are; anything that is not there limits nothing.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    speeds: dict[str, int] = {}
    for number in allowed:
        core = root / f"sys/devices/system/cpu/cpu{number}"
        siblings = _text(core / "topology/thread_siblings_list") or str(number)
        speeds[siblings] = _whole(core / "cpu_capacity") or _whole(core / "cpufreq/cpuinfo_max_freq") or 0
    fast = sum(speed >= _FAST * max(speeds.values()) for speed in speeds.values())
    return max(1, min(MOST_DEFAULT_THREADS, fast, *_shares(root)))


def _shares(root: Path) -> Iterator[int]:
    """Whole processors of every limit on this process's time: its own groups' and those around them."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, group = line.split(":", 2)
        mounts = {"": "sys/fs/cgroup", "cpu": "sys/fs/cgroup/cpu", "cpu,cpuacct": "sys/fs/cgroup/cpu,cpuacct"}
        if controllers not in mounts:
            continue
        mount = root / mounts[controllers]
        folder = mount / group.lstrip("/")
        for place in (folder, *folder.parents):
            quota, period = _quota(place)
            if quota > 0 and period > 0:
                yield quota // period
            if place == mount:
                break


def _quota(group: Path) -> tuple[int, int]:
    """Microseconds of processor time in a period of as many; 0 where there is no limit."""
    if whole := _text(group / "cpu.max"):  # version 2
        quota, _, period = whole.partition(" ")
        return (int(quota), int(period)) if quota.isdecimal() and period.isdecimal() else (0, 0)
    return _whole(group / "cpu.cfs_quota_us") or 0, _whole(group / "cpu.cfs_period_us") or 0


def _text(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        return None


def _whole(file: Path) -> int | None:
    text = _text(file)
    return int(text) if text and text.isdecimal() else None
