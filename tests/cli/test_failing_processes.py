"""One of several processes fails: none waits for it, one line tells of it, and the run goes on from its checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import failing_commands
import pytest
from failing_commands import RECIPE, WHO, launch
from spread_commands import free_ports

from mobilellm.cli.main import _main
from mobilellm.data.documents import Document
from mobilellm.data.shards import write_shards
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.checkpoint_files import checkpoints, damage, read_state
from mobilellm.train.metrics import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

TOLD = {
    "not a number": "step 8: loss nan and gradient norm nan are not both finite",
    "disk full of tensors": "step-00000006: No space left on device; so says process",
    "bad shard": "shards/train-00000.bin: its sha256 differs; so says process 1 of 2",
    "disk full at the end": "step-00000006: No space left on device; so says process 1 of 2",
}
"""What the one line says, which no other process repeats."""
SHARED = ["not a number", "disk full of tensors", "asked to stop"]
"""Of these all processes hear; from others they learn by the end of one, so that nothing can follow in it."""
FSDP, ASYNC = ["--compute.strategy", "fsdp"], ["--checkpoint.asynchronous"]


def train(out: str, *flags: str) -> list[str]:
    return ["train", "recipe.toml", "--out", out, "--device", "cpu", *flags]


def losses(out: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]


def complaints(said: list[Any]) -> list[str]:
    """The lines by which processes end, without warnings of torch."""
    return [line for each in said for line in each.said.splitlines() if line.startswith("mobilellm: error: ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards, a recipe, and in `alone` its run in one process."""
    folder = tmp_path_factory.mktemp("failing")
    text = "one small thing after another, and then all over again"
    tokenizer = Tokenizer.train([text] * 20, 300)
    documents = [Document(f"{number} {text} " * 20, str(number)) for number in range(40)]
    write_shards(folder / "shards", documents, tokenizer, "here", "mine")
    (folder / "recipe.toml").write_text(RECIPE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert _main(train("alone")) == 0
    return folder


def the_newest_is_whole(out: Path, step: int) -> None:
    assert [path.name for path in checkpoints(out / "checkpoints")][-1] == f"step-{step:08d}"
    newest = checkpoints(out / "checkpoints")[-1]
    assert damage(newest, read_state(newest)[1]) == ""


@pytest.mark.parametrize(
    ("name", "flags", "failures"),
    [
        ("ddp", [], [*SHARED, "bad shard"]),
        ("fsdp", FSDP, [*SHARED, "disk full at the end"]),
        ("in the background", ASYNC, ["disk full of tensors", "disk full at the end"]),
    ],
)
def test_one_that_raises_ends_all_with_its_line(
    place: Path, name: str, flags: list[str], failures: list[str]
) -> None:
    commands = [(failure, train(f"{name}/{failure}", *flags)) for failure in failures]
    everywhere = launch(2, place, commands, free_ports(len(commands)))
    assert [ended.code for ended, _ in everywhere] == [0, 0], everywhere
    for failure, *now in zip(failures, *(seen for _, seen in everywhere), strict=True):
        asked = failure == "asked to stop"
        assert {each.code for each in now} == {75 if asked else 2}, (failure, now)
        lines = complaints(now)
        assert len(lines) == (0 if asked else 1), (failure, now)
        assert asked or TOLD[failure] in lines[0], (failure, lines)
        _goes_on(place, f"{name}/{failure}")


@pytest.mark.parametrize(
    ("size", "flags", "failure"),
    [
        (4, [], "killed while evaluating"),
        (2, FSDP, "killed in a step"),
        (2, FSDP, "killed while saving"),
        (2, ASYNC, "killed while saving"),
    ],
)
def test_one_that_is_killed_leaves_a_checkpoint(
    place: Path, size: int, flags: list[str], failure: str
) -> None:
    """The others end by themselves; a world of another size goes on."""
    out = f"{failure} of {size} {' '.join(flags)}"
    everywhere = launch(size, place, [(failure, train(out, *flags))], free_ports(1))
    codes = [ended.code for ended, _ in everywhere]
    assert codes == [-9 if rank == WHO else 0 for rank in range(size)], everywhere
    said = [each for _, seen in everywhere for each in seen]
    assert [each.code for each in said] == [2] * (size - 1)
    (line,) = complaints(said)
    assert f"of {size} lost contact with another, which was killed or cannot be reached (" in line
    the_newest_is_whole(place / out, 6 if failure == "killed in a step" else 3)
    _goes_on(place, out)
    starts = json.loads((place / out / "run.json").read_text())["starts"]
    assert [start["world_size"] for start in starts] == [size, 1]


def test_torchrun_starts_all_again(place: Path) -> None:
    """Whom it starts again meet each other, and not those who are gone."""
    (place / "commands.json").write_text(json.dumps([("killed in a step", train("again"))]))
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=2"]
    done = subprocess.run(
        [sys.executable, "-m", *launcher, failing_commands.__file__, str(place)],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(place / "again") == pytest.approx(losses(place / "alone"), rel=1e-5)
    starts = json.loads((place / "again" / "run.json").read_text())["starts"]
    assert [(start["step"], start["world_size"]) for start in starts] == [(0, 2), (6, 2)]


def _goes_on(place: Path, out: str) -> None:
    """In one process, to the losses of the run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert _main(train(out)) == 0
    assert losses(place / out) == pytest.approx(losses(place / "alone"), rel=1e-5)
    assert not list((place / out / "checkpoints").glob("*.tmp"))
