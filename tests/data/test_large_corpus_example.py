"""docs/examples/large_corpus.py: run with the local executor; built for Slurm and Ray without a cluster."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("datatrove", reason="needs mobilellm[datatrove]")
pytest.importorskip("orjson", reason="needs mobilellm[datatrove]")

from mobilellm.data.shards import read_index, read_split, verify
from tokenizer_oracles import trained

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "docs" / "examples" / "large_corpus.py"
STAGES = ["filter", "signatures", "buckets", "clusters", "shards", "merge"]


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """A corpus of four files: prose, a near duplicate in another file, numbers, a text that is too short."""
    from pydoc_data.topics import topics

    long = [
        text
        for text in topics.values()
        if len(text) > 1000 and sum(map(str.isalpha, text)) > 0.65 * len(text)
    ]
    texts = [*long[:20], long[0] + " One more sentence.", "1 2 3 4 " * 100, "short"]
    (tmp_path / "in").mkdir()
    for number in range(4):
        lines = [json.dumps({"text": text}) for text in texts[number::4]]
        (tmp_path / "in" / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    trained().save(tmp_path / "tokenizer")
    folders = {"input": "in", "work": "work", "out": "shards", "tokenizer": "tokenizer"}
    given = [part for flag, name in folders.items() for part in (f"--{flag}", str(tmp_path / name))]
    return [*given, "--tasks", "2", "--held-out", "0.2", "--licence", "PSF-2.0"]


def run_example(engine: str, arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), engine, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT / "src"), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("large_corpus", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "large_corpus", module)
    spec.loader.exec_module(module)
    return module


def test_on_this_machine(tmp_path: Path, arguments: list[str]) -> None:
    run_example("local", [*arguments, "--workers", "1"])
    index = read_index(tmp_path / "shards")
    verify(tmp_path / "shards")
    assert index.total("train", "documents") + index.total("held-out", "documents") == 20
    assert index.total("held-out", "documents") > 0
    assert index.licence == "PSF-2.0"
    read_split(tmp_path / "shards", "train", trained())
    removed = [
        path.relative_to(tmp_path / "work" / "removed").parts[0] for path in tmp_path.glob("work/removed/*/*")
    ]
    assert set(removed) == {"filter", "similar"}
    said = run_example("local", [*arguments, "--workers", "1"])
    assert said.count("have already been completed") == len(STAGES)


def test_slurm_gets_a_chain_of_jobs(tmp_path: Path, arguments: list[str]) -> None:
    """A stand-in for sbatch keeps what it is given and answers with a number."""
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(
        '#!/bin/sh\nset -- "$@"; for last; do :; done\n'
        f'echo "$*" >> {tmp_path}/calls; number=$(grep -c . {tmp_path}/calls)\n'
        f'cp "$last" {tmp_path}/job-$number; echo "Submitted batch job $number"\n'
    )
    sbatch.chmod(0o755)
    settings = [
        "--partition",
        "night",
        "--time",
        "01:00:00",
        "--cpus-per-task",
        "2",
        "--env-command",
        "activate",
    ]
    run_example("slurm", [*arguments, *settings], PATH=f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    jobs = [
        (tmp_path / f"job-{number}").read_text() for number in range(1, 13, 2)
    ]  # after each, one for its statistics
    names = [found for job in jobs for found in re.findall("--job-name=shards-(.*)", job)]
    assert names == STAGES
    assert [found for job in jobs for found in re.findall("--array=0-(.*)", job)] == [
        "1",
        "1",
        "13",
        "0",
        "1",
        "0",
    ]
    for job, stage in zip(jobs, STAGES, strict=True):
        assert "#SBATCH --partition=night\n" in job
        assert "#SBATCH --cpus-per-task=2\n" in job
        assert "\nactivate\n" in job
        assert f"launch_pickled_pipeline {tmp_path / 'work' / 'logs' / stage / 'executor.pik'}" in job
        assert (tmp_path / "work" / "logs" / stage / "executor.pik").stat().st_size > 0
    calls = (tmp_path / "calls").read_text().splitlines()[::2]
    after = [
        found.group(1) if (found := re.search("dependency=afterok:([0-9]+)", call)) else "" for call in calls
    ]
    assert after == ["", "1", "3", "5", "7", "9"]


def test_ray_gets_the_same_stages(example: ModuleType, arguments: list[str]) -> None:
    made, tasks = example.executor(example.parsed(["ray", *arguments])), []
    while made is not None:
        assert type(made).__name__ == "RayPipelineExecutor"
        tasks.append(made.tasks)
        made = made.depends
    assert tasks == [1, 2, 1, 14, 2, 2]


def test_the_filter(example: ModuleType) -> None:
    document = example.Document(text="", id="")
    for text, expected in {
        "word " * 100: True,
        "word": (False, "length"),
        "word " * 200_001: (False, "length"),
        "1 2 3 " * 100: (False, "letters"),
        "語" * 200: True,
    }.items():
        document.text = text
        assert example.is_prose(document) == expected
