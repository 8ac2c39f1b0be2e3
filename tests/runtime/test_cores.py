from __future__ import annotations

import os
from pathlib import Path

import pytest

from mobilellm.runtime.cores import default_threads


@pytest.fixture
def six_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def cores(root: Path, name: str, values: list[str]) -> Path:
    for number, value in enumerate(values):
        write(root / f"sys/devices/system/cpu/cpu{number}/{name}", value)
    return root


@pytest.mark.usefixtures("six_processors")
@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("nothing", [], 4),
        ("topology/thread_siblings_list", ["0,3", "1,4", "2,5"] * 2, 3),
        ("cpu_capacity", ["1024"] * 2 + ["760"] * 4, 2),
        ("cpu_capacity", ["1024"] + ["900"] * 2 + ["300"] * 3, 3),
        ("cpufreq/cpuinfo_max_freq", ["5200000", "5000000"] + ["3900000"] * 4, 2),
    ],
)
def test_fast_cores_count_once(tmp_path: Path, name: str, values: list[str], expected: int) -> None:
    assert default_threads(cores(tmp_path, name, values)) == expected


@pytest.mark.usefixtures("six_processors")
@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 4),
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        (
            "4:memory:/x\n1:cpu:/a",
            {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("1:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1"}, 4),
        ("0::/", {"cpu.max": "what is this"}, 4),
    ],
)
def test_a_share_of_processor_time_limits_them(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    write(tmp_path / "proc/self/cgroup", groups)
    for name, text in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, text)
    assert default_threads(tmp_path) == expected


def test_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= default_threads() <= 4
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert 1 <= default_threads() <= 4
