"""One of several processes fails: none waits for it, one line tells of it, and the run goes on from its checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
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
SHARED = ("not a number", "disk full of tensors", "asked to stop")
"""Of these all processes hear; from the others they learn by the end of one, so that nothing can follow."""
KILLED = ("killed in a step", "killed while saving", "killed while evaluating")
FSDP, ASYNC = ("--compute.strategy", "fsdp"), ("--checkpoint.asynchronous",)
SPREADS = [("ddp", ()), ("fsdp", FSDP), ("in the background", ASYNC)]


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


@pytest.mark.parametrize(("name", "flags"), SPREADS)
def test_one_that_raises_ends_all_with_its_line(place: Path, name: str, flags: tuple[str, ...]) -> None:
    for failures in ([*SHARED, "bad shard"], ["disk full at the end"]):
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


@pytest.mark.parametrize("failure", KILLED)
@pytest.mark.parametrize(("size", "name", "flags"), [(2, *SPREADS[1]), (2, *SPREADS[2]), (4, *SPREADS[0])])
def test_one_that_is_killed_leaves_a_checkpoint(
    place: Path, failure: str, size: int, name: str, flags: tuple[str, ...]
) -> None:
    """The others end by themselves; a world of another size goes on."""
    out = f"{name}/{failure}"
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


def _goes_on(place: Path, out: str) -> None:
    """In one process, to the losses of the run that nothing happened to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        assert _main(train(out)) == 0
    assert losses(place / out) == pytest.approx(losses(place / "alone"), rel=1e-5)
    assert not list((place / out / "checkpoints").glob("*.tmp"))
