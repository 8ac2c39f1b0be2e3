"""`mobilellm data batch`: the text of the batch that stopped a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from chat_data import conversations

from mobilellm.cli.data_batch import _read_in
from mobilellm.cli.main import _main
from mobilellm.data.chat_loader import ChatRows
from mobilellm.data.loader import PackedLoader
from mobilellm.data.shards import read_split
from mobilellm.tokenizer import BOS_ID, Tokenizer
from mobilellm.train.recipe import load_recipe

from .test_train import command, written_place


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    """A run whose learning rate was far too large."""
    place = written_place(tmp_path_factory.mktemp("stopped"), small_text)
    out = place / "run"
    assert _main(command(place, out, "--optim.lr", "1e30", "--schedule.warmup-steps", "0")) == 2
    return out


def test_the_text_is_that_of_the_step(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = json.loads((stopped / "bad-batch.json").read_text())
    assert told["step"] > 1
    assert _main(["data", "batch", str(stopped), "-n", "1000", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    recipe = load_recipe(stopped / "recipe.toml")
    tokenizer = Tokenizer.load(recipe.data.train[0] / "tokenizer")
    loader = PackedLoader(
        read_split(recipe.data.train[0], "train", tokenizer),
        recipe.batch.sequence_length,
        recipe.batch.sequences_per_step,
        recipe.seed,
    )
    for _ in range(told["step"]):
        batch = loader.next()
    assert (shown["step"], shown["reason"]) == (told["step"], told["reason"])
    assert (shown["sequences"], shown["length"]) == batch.tokens.shape
    assert len(shown["shown"]) == len(batch.tokens)
    for row, each in enumerate(shown["shown"]):
        assert each["sequence"] == row + 1
        assert each["targets"] == (batch.weights[row] > 0).sum()
        words = re.sub(r"<s>|</s>", " ", each["text"]).split()
        decoded = tokenizer.decode([*batch.tokens[row].tolist(), int(batch.targets[row, -1])])
        assert words == decoded.split()


def test_as_a_person_reads_it(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["data", "batch", str(stopped), "-n", "1", "--skip", "1"]) == 0
    shown = capsys.readouterr().out
    assert "not both finite" in shown
    assert "sequence 2 of " in shown
    assert "more: --skip 2" in shown


@pytest.mark.parametrize("packing", [True, False])
def test_conversations_are_whole_and_without_padding(packing: bool, tmp_path: Path) -> None:
    talks = conversations(tmp_path, 9)
    rows = ChatRows(talks, 150, seed=1, packing=packing)
    batch = rows.batch(0, rows.num_rows)
    assert (batch.weights[:, -1] == 0).any()
    read = [token for row in range(rows.num_rows) for token in _read_in(batch, row)]
    wanted = [part.tolist() for part in np.split(talks.tokens, talks.ends[:-1])]
    begins = [place for place, token in enumerate(read) if token == BOS_ID]
    found = [part.tolist() for part in np.split(np.array(read), begins[1:])]
    assert sorted(found) == sorted(wanted)


def test_refusals(stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["data", "batch", str(tmp_path)]) == 2
    assert "bad-batch.json: not there" in capsys.readouterr().err
    (tmp_path / "bad-batch.json").write_text('{"batch": 1}')
    assert _main(["data", "batch", str(tmp_path)]) == 2
    assert "not what a run writes there" in capsys.readouterr().err
    assert _main(["data", "batch", str(stopped), "--skip", "-1"]) == 2
    assert "skip -1 must be 0 or above" in capsys.readouterr().err
