"""benchmarks/gpu.sh, as far as a machine without a GPU can tell; where there is one, its checks."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mobilellm.model import document_mask, training
from varlen_stand_in import kernels_on_the_cpu

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_training  # noqa: E402
import gpu_worker  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LONG = ("compiled_as_plain", "as_on_the_cpu", "muon_as_on_the_cpu")
WORKER = """
import faulthandler, json, os, sys, time
for task in json.loads(sys.argv[1])["tasks"]:
    name = task.get("name")
    if name == "crashes":
        sys.exit("a line\\nno luck")
    if name == "crashes in native code":
        faulthandler.enable()
        os.abort()
    if name == "is killed":
        os.kill(os.getpid(), 9)
    if name == "hangs":
        time.sleep(60)
    print(json.dumps({"passed": True}), flush=True)
"""


def options(folder: Path, **changes: Any) -> argparse.Namespace:
    values = {
        "sizes": ["test"], "sequences": 4, "length": 64, "device": "cpu", "budget": 300.0, "no_rival": False,
        "only": "checks", "json": folder / "gpu.json",
    }  # fmt: skip
    return argparse.Namespace(**(values | changes))


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that crashes and hangs as its tasks' names say."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    monkeypatch.setattr(gpu, "WORKER", script)
    monkeypatch.setattr(gpu, "START", 4.0)
    monkeypatch.setattr(gpu, "LIMITS", dict.fromkeys(gpu.LIMITS, 1.0))


def test_what_crashes_or_hangs_costs_only_itself(
    worker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("first", "crashes", "crashes in native code", "is killed", "second", "hangs", "third")
    monkeypatch.setattr(gpu, "CHECKS", names)
    written = list[int]()
    add = gpu._Report.add

    def added(report: Any, *arguments: Any) -> None:
        add(report, *arguments)
        written.append(len(json.loads((tmp_path / "gpu.json").read_text())["checks"]))

    monkeypatch.setattr(gpu._Report, "add", added)
    gpu.run(options(tmp_path))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert written == [0, 1, 2, 3, 4, 5, 6, 7]  # after every task, the card's included
    assert found["complete"]
    assert found["checks"] == {
        "first": {"passed": True},
        "crashes": {"failed": "exit code 1: no luck"},
        "crashes in native code": {"failed": "killed by SIGABRT: Fatal Python error: Aborted"},
        "is killed": {"failed": "killed by SIGKILL: no reason given"},
        "second": {"passed": True},
        "hangs": {"left_out": "none after 1 s"},
        "third": {"passed": True},
    }


def test_no_task_begins_after_the_budget(
    worker: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.run(options(tmp_path, budget=10.0))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {result["left_out"] for result in found["checks"].values()} == {"the budget of seconds was spent"}
    assert "0 passed, 10 left out, none failed" in capsys.readouterr().err


def test_half_of_what_does_not_fit_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: gpu_training.Run) -> list[float]:
        if self.micro > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if self.micro == 1:
            raise RuntimeError("something else")
        return [1.0] * 6

    monkeypatch.setattr(gpu_training.Run, "ours", run)
    shape = gpu_training.Shape(torch.device("cpu"), 8, 64)
    found = gpu_training.training(shape, "ours", "test")
    assert (found["micro_batch"], found["did_not_fit"]) == (2, [8, 4])
    assert found["tokens_per_second"] == 8 * 64
    with pytest.raises(RuntimeError, match="something else"):
        gpu_training.training(shape._replace(sequences=1), "ours", "test")


@pytest.mark.skipif(DEVICE.type == "cuda", reason="there is a GPU here")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"gpu: cuda cannot be used \("):
        gpu.run(options(tmp_path, device="cuda"))
    assert "failed" in json.loads((tmp_path / "gpu.json").read_text())["card"]


def test_no_failure_is_without_its_reason(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """An assertion without a text is told by its place; a run that a signal ends early says so."""
    with pytest.raises(AssertionError) as caught:
        assert_nothing(1, 2)
    assert re.fullmatch(
        r"AssertionError: in assert_nothing, line \d+ of test_gpu_benchmark.py: raise AssertionError",
        gpu_worker.told(caught.value),
    )
    caught.value.add_note("the last checkpoint was not written, either (no space)")
    assert gpu_worker.told(caught.value) == (
        "AssertionError: the last checkpoint was not written, either (no space)"
    )
    monkeypatch.setattr(gpu_checks, "train", lambda *_, **__: gpu_checks.Outcome(2, "requeue"))
    with pytest.raises(RuntimeError, match=r"a signal \(requeue\) ended the run after step 2"):
        gpu_checks.check("ddp_as_alone", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="2 losses to compare with 3: a run began at another step"):
        gpu_checks._apart([1.0, 2.0], [1.0, 2.0, 3.0])


def assert_nothing(one: int, two: int) -> None:
    if one != two:
        raise AssertionError


def test_every_check_has_its_function() -> None:
    assert tuple(gpu_checks.CHECKS) == gpu.CHECKS


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in gpu.CHECKS],
)
def test_it_computes_what_it_should(name: str, one_thread: None) -> None:
    """On the GPU, if there is one; on a CPU both sides of many are the same, which tries the check itself."""
    result = gpu_checks.check(name, DEVICE)
    if DEVICE.type == "cpu" and name.startswith("documents"):
        assert result == {"left_out": "runs on a GPU only"}
    else:
        assert result["passed"], result


@pytest.mark.slow
def test_documents_are_judged_as_they_should(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """That check itself, with a stand-in for the kernel, and with one that mixes documents up."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(training, "why_plain", lambda model: "as on a GPU")
    monkeypatch.setattr(
        document_mask, "way_to_attend", lambda device, dtype: next(iter(document_mask.WAYS), "dense")
    )
    with kernels_on_the_cpu():
        result = gpu_checks.packed_against_alone("varlen", cpu)
        assert result["passed"], result
        pack = document_mask.pack
        monkeypatch.setattr(
            document_mask, "pack", lambda starts, device: pack(torch.zeros_like(starts), device)
        )
        assert not gpu_checks.packed_against_alone("varlen", cpu)["passed"]


@pytest.mark.slow
def test_a_trial_of_all_of_it(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    gpu.run(options(tmp_path, only=None))
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["complete"]
    assert found["card"]["name"] == "CPU"
    failed = {name: each for name, each in found["checks"].items() if not each.get("passed")}
    assert {name: each for name, each in failed.items() if "left_out" not in each} == {}
    assert found["attention"]["test"]["documents, dense"]["both_ms"] > 0
    runs = found["sizes"]["test"]
    assert (
        [run["micro_batch"] for run in runs["ours"]]
        == [run["micro_batch"] for run in runs["trainer"]]
        == [4, 2]
    )
    assert runs["ratio_of_speed"] > 0
    assert [run["tokens_per_second"] > 0 for run in found["variants"]] == [True] * 3
