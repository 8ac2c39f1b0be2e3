"""docs/examples/pretrain.sbatch on a real Slurm, where one runs: a job that is warned goes on where it stopped.

All nodes must see the folders of the tests: `pytest --basetemp` names another place for them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mobilellm.data.documents import Document
from mobilellm.data.shards import write_shards
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "docs" / "examples" / "pretrain.sbatch"
STEPS, TASKS = 200, 2
RECIPE = f"""
steps = {STEPS}
evaluate_every = 100
[model]
preset = "test-ls"
[data]
train = ["shards"]
held_out_tokens = 200
[batch]
tokens_per_step = 64
sequence_length = 16
micro_batch = 2
[schedule]
warmup_steps = 5
[compute]
precision = "float32"
[log]
tensorboard = false
"""

pytestmark = pytest.mark.slow


def told(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


class Cluster:
    """What is needed of Slurm, in a folder with shards and a recipe."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, list[str]()
        nodes = set(told("sinfo", "-h", "-N", "-t", "idle,mix", "-o", "%N").split())
        self.spread = min(len(nodes), TASKS)
        text = "one small thing after another, and then all over again"
        documents = [Document(f"{number} {text} " * 20, str(number)) for number in range(40)]
        write_shards(folder / "shards", documents, Tokenizer.train([text] * 20, 300), "here", "mine")
        (folder / "recipe.toml").write_text(RECIPE)
        (folder / "bin").mkdir()
        command = folder / "bin" / "mobilellm"
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mobilellm "$@"\n')
        command.chmod(0o755)

    def submit(self, name: str, *flags: str) -> str:
        """The job's number."""
        environment = os.environ | {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT / "src"),
            "RECIPE": "recipe.toml", "DATA": "shards", "OUT": name,
        }  # fmt: skip
        size = [f"--nodes={self.spread}", f"--ntasks-per-node={TASKS // self.spread}", "--gpus-per-node=0"]
        done = subprocess.run(
            ["sbatch", "--parsable", *size, "--cpus-per-task=1", "--time=20", str(SCRIPT), "--device", "cpu", *flags],
            cwd=self.folder, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        self.jobs.append(done.stdout.strip())
        return self.jobs[-1]

    def job(self, number: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S+)", told("scontrol", "show", "job", number)))

    def wait(self, what: str, done: Callable[[], bool], number: str) -> None:
        until = time.monotonic() + 600
        while not done():
            assert time.monotonic() < until, f"{what}: {self.job(number)} {self.said(number)}"
            time.sleep(0.2)

    def said(self, number: str) -> str:
        file = self.folder / f"mobilellm-{number}.log"
        return file.read_text() if file.is_file() else ""

    def losses(self, name: str) -> list[float]:
        return [each["loss"] for each in read_metrics(self.folder / name / "metrics.jsonl") if "loss" in each]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    if shutil.which("sbatch") is None:
        pytest.skip("needs Slurm: there is no sbatch here")
    ping = subprocess.run(
        ["scontrol", "ping"], capture_output=True, text=True, timeout=60, check=False
    ).stdout
    if " UP" not in ping:
        pytest.skip("needs Slurm: its controller does not answer")
    made = Cluster(tmp_path)
    yield made
    for number in made.jobs:
        subprocess.run(["scancel", number], check=False)


def test_a_job_that_is_warned_goes_on_bit_for_bit(cluster: Cluster) -> None:
    whole, warned = cluster.submit("whole"), cluster.submit("warned")
    cluster.wait("begins", lambda: len(cluster.losses("warned")) > 10, warned)
    told("scancel", "--signal=USR1", warned)  # as Slurm does some time before the job's is over
    cluster.wait("is requeued", lambda: cluster.job(warned)["JobState"] == "PENDING", warned)
    assert "Exited with exit code 75" in cluster.said(warned)
    assert 10 < len(cluster.losses("warned")) < STEPS
    for number in (whole, warned):
        cluster.wait("ends", lambda number=number: cluster.job(number)["JobState"] == "COMPLETED", number)
    assert cluster.job(warned)["Restarts"] == "1"
    assert cluster.losses("warned") == cluster.losses("whole")
    assert len(cluster.losses("whole")) == STEPS
    starts = json.loads((cluster.folder / "warned" / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [TASKS, TASKS]
    assert starts[1]["step"] > 10


def test_a_mistake_is_not_requeued(cluster: Cluster) -> None:
    number = cluster.submit("wrong", "--data.weights", "1", "2")
    cluster.wait("ends", lambda: cluster.job(number)["JobState"] == "FAILED", number)
    assert cluster.job(number)["ExitCode"] == "2:0"
    assert cluster.job(number)["Restarts"] == "0"
    assert "mobilellm: error: " in cluster.said(number)
