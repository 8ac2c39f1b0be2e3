"""docs/pretraining.md: its commands are understood; its Slurm script requeues what was stopped, and only that."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from mobilellm.cli.main import VERBS
from mobilellm.cli.parse import parse
from mobilellm.data.documents import Document
from mobilellm.data.shards import write_shards
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.metrics import read_metrics
from mobilellm.train.recipe import load_recipe, to_toml

DOCS = Path(__file__).parents[1] / "docs"
SCRIPT = DOCS / "examples" / "pretrain.sbatch"
PAGE = (DOCS / "pretraining.md").read_text(encoding="utf-8")

SRUN = """
import os, pathlib, signal, subprocess, sys, time
words = [word for word in sys.argv[1:]]
while words[0].startswith("--"):
    words.pop(0)
assert words.pop(0) == "mobilellm"
command = [sys.executable, "-m", "mobilellm", *words]
count = int(os.environ["SLURM_NTASKS"])
tasks = [
    subprocess.Popen(
        command,
        env=os.environ
        | {"SLURM_PROCID": str(i), "SLURM_LOCALID": str(i), "SLURM_STEP_NUM_TASKS": str(count)},
    )
    for i in range(count)
]
stop_after = int(os.environ.get("STOP_AFTER", 0))
metrics = pathlib.Path(os.environ["OUT"]) / "metrics.jsonl"
while stop_after and all(task.poll() is None for task in tasks):
    if metrics.is_file() and metrics.read_text().count('"loss"') > stop_after:
        for task in tasks:
            task.send_signal(signal.SIGUSR1)
        break
    time.sleep(0.005)
sys.exit(max(task.wait() % 256 for task in tasks))
"""
SCONTROL = """
import os, pathlib, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("127.0.0.1\\nother-node")
else:
    with open(os.environ["REQUEUED"], "a") as stream:
        print(*sys.argv[1:], file=stream)
"""


def commands() -> list[list[str]]:
    """Every `mobilellm` command of the page, also those after torchrun, as words."""
    lines = [
        line for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()
    ]
    found = []
    for line in lines:
        words = shlex.split(line)
        if "mobilellm" in words:
            found.append(words[words.index("mobilellm") + 1 :])
    return found


def test_every_command_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "recipe.toml").write_text(to_toml(load_recipe("tiny-cpu")))
    assert len(commands()) >= 10
    for verb, *rest in commands():
        if verb in VERBS:
            parse(verb, import_module(f"mobilellm.cli.{verb}"), rest)
    assert {"train", "report", "generate"} <= {verb for verb, *_ in commands()}


def test_links_lead_somewhere_and_recipes_are_named() -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (DOCS / target).is_file(), target
    for name in re.findall(r"pretrain-[\w.]*\d+m?b?(?:-ls)?", PAGE):
        load_recipe(name)


class Cluster:
    """srun and scontrol of a Slurm that is this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requeued = folder, folder / "requeued"
        bin_folder = folder / "bin"
        bin_folder.mkdir()
        for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
            (bin_folder / f"{name}.py").write_text(code)
            (bin_folder / name).write_text(
                f'#!/bin/sh\nexec "{sys.executable}" "{bin_folder}/{name}.py" "$@"\n'
            )
            (bin_folder / name).chmod(0o755)
        self.environment = os.environ | {
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NTASKS": "2",
            "OUT": str(folder / "run"),
            "DATA": str(folder / "shards"),
            "RECIPE": str(folder / "recipe.toml"),
            "REQUEUED": str(self.requeued),
            "OMP_NUM_THREADS": "1",
        }

    def submit(self, *arguments: str, **environment: str) -> int:
        done = subprocess.run(
            ["bash", str(SCRIPT), *arguments], env=self.environment | environment, cwd=self.folder,
            capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        (self.folder / "log").write_text(done.stdout + done.stderr)
        return done.returncode

    def requeues(self) -> list[str]:
        return self.requeued.read_text().splitlines() if self.requeued.is_file() else []


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


@pytest.mark.parametrize("code", [0, 1, 2, 74, 75, 76, 130, 137, 138])
def test_only_what_was_stopped_is_requeued(cluster: Cluster, code: int) -> None:
    (cluster.folder / "bin" / "srun").write_text(
        f'#!/bin/sh\necho "$MASTER_ADDR $MASTER_PORT $SRUN_CPUS_PER_TASK $OMP_NUM_THREADS $@"\nexit {code}\n'
    )
    del cluster.environment["OMP_NUM_THREADS"]
    assert cluster.submit("--optim.lr", "1e-3", SLURM_CPUS_PER_TASK="8") == code
    assert cluster.requeues() == (["requeue 4711"] if code == 75 else [])
    said = (cluster.folder / "log").read_text().split()
    assert said[0] == "127.0.0.1"
    assert 1024 < int(said[1]) < 32768  # where Linux begins to give ports away
    assert said[2:4] == ["8", "8"]  # cores of a task, which srun would leave at one
    assert said[said.index("mobilellm") :] == [
        "mobilellm", "train", cluster.environment["RECIPE"], "--data.train", cluster.environment["DATA"],
        "--out", cluster.environment["OUT"], "--optim.lr", "1e-3",
    ]  # fmt: skip


@pytest.mark.slow
def test_a_job_that_runs_out_of_time_goes_on(cluster: Cluster) -> None:
    """Two tasks get SIGUSR1 after some steps: checkpoint, code 75, requeue; the same script then finishes."""
    text = "one small thing after another, and then all over again"
    tokenizer = Tokenizer.train([text] * 20, 300)
    documents = [Document(f"{number} {text} " * 20, str(number)) for number in range(40)]
    write_shards(cluster.folder / "shards", documents, tokenizer, "here", "mine")
    if not (cluster.folder / "shards" / "tokenizer").is_dir():
        tokenizer.save(cluster.folder / "shards" / "tokenizer")
    (cluster.folder / "recipe.toml").write_text(
        'steps = 120\nevaluate_every = 1000\n[model]\npreset = "test-ls"\n[data]\ntrain = ["shards"]\n'
        "held_out_tokens = 200\n[batch]\ntokens_per_step = 64\nsequence_length = 16\nmicro_batch = 2\n"
        "[schedule]\nwarmup_steps = 5\n[log]\ntensorboard = false\n"
    )
    assert cluster.submit(STOP_AFTER="3") == 75, (cluster.folder / "log").read_text()
    assert cluster.requeues() == ["requeue 4711"]
    log = read_metrics(cluster.folder / "run" / "metrics.jsonl")
    before = [record["step"] for record in log if "loss" in record]
    assert 3 <= len(before) < 120
    assert cluster.submit() == 0, (cluster.folder / "log").read_text()
    assert len(cluster.requeues()) == 1
    log = read_metrics(cluster.folder / "run" / "metrics.jsonl")
    assert [record["step"] for record in log if "loss" in record] == list(range(1, 121))
    assert json.loads((cluster.folder / "run" / "run.json").read_text())["world_size"] == 2
