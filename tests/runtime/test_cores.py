from __future__ import annotations

import os
from pathlib import Path

import pytest

from mobilellm.runtime.cores import Cores, cores, default_threads


@pytest.fixture
def six_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text + "\n")


def described(root: Path, name: str, values: list[str]) -> Path:
    for number, value in enumerate(values):
        write(root / f"sys/devices/system/cpu/cpu{number}/{name}", value)
    return root


@pytest.mark.usefixtures("six_processors")
@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("nothing", [], (6, 6)),
        ("topology/thread_siblings_list", ["0,3", "1,4", "2,5"] * 2, (3, 3)),
        ("cpu_capacity", ["1024"] * 2 + ["760"] * 4, (2, 6)),
        ("cpu_capacity", ["1024"] + ["900"] * 2 + ["300"] * 3, (3, 6)),
        ("cpufreq/cpuinfo_max_freq", ["5200000", "5000000"] + ["3900000"] * 4, (2, 6)),
        ("cpufreq/cpuinfo_max_freq", ["what is this"] * 6, (6, 6)),
    ],
)
def test_cores_count_once_and_fast_ones_apart(
    tmp_path: Path, name: str, values: list[str], expected: tuple[int, int]
) -> None:
    assert cores(described(tmp_path, name, values)) == expected


def test_a_hybrid_processor_whose_fast_cores_have_two_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four fast cores of two hyper-threads and eight slow ones, as laptops have them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    pairs = [f"{number // 2 * 2}-{number // 2 * 2 + 1}" for number in range(8)]
    described(tmp_path, "topology/thread_siblings_list", pairs + [str(number) for number in range(8, 16)])
    described(tmp_path, "cpufreq/cpuinfo_max_freq", ["4700000"] * 8 + ["3500000"] * 8)
    assert cores(tmp_path) == (4, 12)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6, 16)))
    assert cores(tmp_path) == (1, 9)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8, 16)))
    assert cores(tmp_path) == (8, 8)  # the fastest there are


def test_cores_near_one_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two sockets of 24 cores with two hyper-threads each, numbered as Linux does: 0-23,48-71 and the others."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    described(tmp_path, "topology/thread_siblings_list", [f"{core},{core + 48}" for core in range(48)] * 2)
    write(tmp_path / "sys/devices/system/node/node0/cpulist", "0-23,48-71")
    write(tmp_path / "sys/devices/system/node/node1/cpulist", "24-47,72-95")
    write(tmp_path / "sys/devices/system/node/node2/cpulist", "")  # memory without processors
    assert cores(tmp_path) == (24, 24)
    assert (cores(tmp_path).first_threads, cores(tmp_path).prompt_threads) == (4, 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 24, 25, 26, 27, 28, 72, 73})
    assert cores(tmp_path) == (5, 5)
    write(tmp_path / "sys/devices/system/node/node1/cpulist", "of another kind, 7-x")
    assert cores(tmp_path) == (8, 8)


@pytest.mark.usefixtures("six_processors")
@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/", {"cpu.max": "max 100000"}, 6),
        ("0::/", {"cpu.max": "250000 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("0::/a/b", {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        (
            "4:memory:/x\n1:cpu:/a",
            {"cpu/a/cpu.cfs_quota_us": "200000", "cpu/a/cpu.cfs_period_us": "100000"},
            2,
        ),
        ("1:cpu,cpuacct:/", {"cpu,cpuacct/cpu.cfs_quota_us": "-1"}, 6),
        ("0::/", {"cpu.max": "what is this"}, 6),
    ],
)
def test_a_share_of_processor_time_limits_them(
    tmp_path: Path, groups: str, files: dict[str, str], expected: int
) -> None:
    write(tmp_path / "proc/self/cgroup", groups)
    for name, text in files.items():
        write(tmp_path / "sys/fs/cgroup" / name, text)
    assert cores(tmp_path) == (expected, expected)
    assert default_threads(tmp_path) == min(4, expected)


def test_a_number_is_never_0_nor_too_large() -> None:
    assert (Cores(1, 1).first_threads, Cores(1, 8).prompt_threads) == (1, 1)
    assert (Cores(200, 300).first_threads, Cores(200, 300).prompt_threads) == (4, 16)


def test_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= cores().fast <= cores().usable <= (os.cpu_count() or 1)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert 1 <= cores().fast <= cores().usable <= (os.cpu_count() or 1)
