"""The processor's cores as a pass through a model sees them, from what the system says of them.

Threads of a pass meet some 150 times a token, waiting by looking: one that has no core of its own, or a slow
one, holds up the others each time. So what counts is whole cores near one memory, of which this process may
have all the time; and which of them are fast.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_FAST = 0.8
"""A core with less of the fastest speed is of a slower kind: small ones have a half to three quarters."""
_MOST_AT_FIRST = 4
"""Of a token, which is bound by memory: a few cores use that up."""
_MOST_FOR_PROMPTS = 16
"""Of a pass of 256 tokens each thread has 16 for itself then, the fewest that need no sharing (scratch.h)."""


class Cores(NamedTuple):
    """That this process may have to itself; 1 at least."""

    fast: int
    usable: int
    """The slow ones, too."""

    @property
    def first_threads(self) -> int:
        """For a token, where nothing has been measured."""
        return min(_MOST_AT_FIRST, self.fast)

    @property
    def prompt_threads(self) -> int:
        """For many tokens at once, which keep every core busy by themselves."""
        return min(_MOST_FOR_PROMPTS, self.fast)


def cores(root: Path = Path("/")) -> Cores:
    """Hyper-threads of a core count once; where memory is in several places (NUMA), the cores of one of them,
    for that is where a model lies; of a container's or service's share of processor time (cgroup) only whole
    processors, and one in any case.

    `root` is where /sys and /proc are; anything that is not there limits nothing.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    nodes = dict(_nodes(root))
    speeds: dict[int, dict[str, int]] = defaultdict(
        dict
    )  # of a memory node's cores, each by its hyper-threads
    for number in sorted(allowed):
        core = root / f"sys/devices/system/cpu/cpu{number}"
        siblings = _text(core / "topology/thread_siblings_list") or str(number)
        speed = _whole(core / "cpu_capacity") or _whole(core / "cpufreq/cpuinfo_max_freq") or 0
        speeds[nodes.get(number, 0)][siblings] = speed
    fastest = max(speed for node in speeds.values() for speed in node.values())
    share = min(_shares(root), default=len(allowed))
    counts = [
        (sum(speed >= _FAST * fastest for speed in node.values()), len(node)) for node in speeds.values()
    ]
    fast, usable = max(counts)
    return Cores(max(1, min(fast, share)), max(1, min(usable, share)))


def default_threads(root: Path = Path("/")) -> int:
    """One a fast core, four at most: where a number is needed before anything has been measured."""
    return cores(root).first_threads


def _nodes(root: Path) -> Iterator[tuple[int, int]]:
    """(processor, memory node) of all processors, from lists like 0-3,8-11."""
    for folder in (root / "sys/devices/system/node").glob("node[0-9]*"):
        for part in (_text(folder / "cpulist") or "").split(","):
            first, _, last = part.partition("-")
            if first.isdecimal():
                for number in range(int(first), int(last if last.isdecimal() else first) + 1):
                    yield number, int(folder.name.removeprefix("node"))


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
