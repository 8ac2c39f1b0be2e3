"""`mobilellm shards`: what is said of a folder, and the ways in and out from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm.cli.main import _main
from mobilellm.data.documents import Document
from mobilellm.data.shards import read_index, read_split, write_shards
from tokenizer_oracles import trained

STORIES = [Document(f"story {i}", f"Story {i}.\nIt has {i * i} words,\n\nor é {i}.") for i in range(150)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", [*STORIES, STORIES[0]], trained(), "stories", "ours", held_out=0.1)
    trained().save(tmp_path / "tokenizer")
    return tmp_path / "shards"


def said(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert _main(["shards", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of an error."""
    assert _main(["shards", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    [line] = captured.err.splitlines()
    return line


def test_info(capsys: pytest.CaptureFixture[str], shards: Path) -> None:
    index = read_index(shards)
    done: dict[str, Any] = json.loads(said(capsys, "info", shards, "--json"))
    assert (done["source"], done["licence"], done["tokenizer"]) == ("stories", "ours", trained().fingerprint)
    assert done["splits"]["train"] == {"files": 1} | {
        field: index.total("train", field) for field in ("tokens", "documents", "bytes", "words")
    }
    table = said(capsys, "info", shards)
    for part in ("stories", "ours", "1 duplicate", "held-out", f"{index.total('train', 'tokens'):,}"):
        assert part in table
    assert "no index.json" in refused(capsys, "info", shards.parent)


def test_verify(capsys: pytest.CaptureFixture[str], shards: Path) -> None:
    assert "2 files" in said(capsys, "verify", shards)
    index = read_index(shards)
    tokens = sum(shard.tokens for shard in index.shards)
    assert json.loads(said(capsys, "verify", shards, shards, "--json")) == {
        "verified": [{"directory": str(shards), "files": 2, "tokens": tokens}] * 2
    }
    file = shards / "train-00000.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert "train-00000.bin: its bytes are not those" in refused(capsys, "verify", shards)
    assert "no folder is named" in refused(capsys, "verify")


def test_there_and_back(capsys: pytest.CaptureFixture[str], shards: Path) -> None:
    there, back = shards.parent / "reference", shards.parent / "back"
    done = json.loads(said(capsys, "export", shards, there, "--nodes", 2, "--sequence-length", 63, "--json"))
    assert (done["nodes"], done["sequence_length"], done["split"]) == (2, 63, "train")
    assert "not empty" in refused(capsys, "export", shards, there, "--nodes", 2, "--sequence-length", 63)
    printed = said(capsys, "export", shards, there, "--nodes", 1, "--sequence-length", 31, "--overwrite")
    assert "lines      " in printed
    assert "remainder.jsonl" in printed
    tokenizer = ["--tokenizer", shards.parent / "tokenizer"]
    said(capsys, "import", there, *tokenizer, "--out", back, "--held-out", 0)
    assert np.array_equal(read_split(back, "train"), read_split(shards, "train"))
    index = json.loads(
        said(capsys, "import", there, *tokenizer, "--out", back, "--held-out", "0.3", "--overwrite", "--json")
    )
    assert index["splits"]["train"]["documents"] > index["splits"]["held-out"]["documents"] > 0
    assert (index["source"], index["licence"]) == ("stories", "ours")
    merged = json.loads(said(capsys, "merge", back, "--out", shards.parent / "merged", "--json"))
    assert merged["splits"] == index["splits"]
    assert "hold out" not in refused(
        capsys, "merge", back, shards.parent / "nowhere", "--out", shards.parent / "no"
    )


def test_what_was_not_so_good_is_told(capsys: pytest.CaptureFixture[str], shards: Path) -> None:
    reference = shards.parent / "reference"
    (reference / "1").mkdir(parents=True)
    (reference / "1" / "x.jsonl").write_text('{"token_ids": [300, 301, 2]}\n{"token_ids": [300, 3\n')
    arguments = [
        "import",
        reference,
        "--tokenizer",
        shards.parent / "tokenizer",
        "--out",
        shards.parent / "new",
    ]
    assert _main(["shards", *map(str, arguments)]) == 0
    notes = capsys.readouterr().err
    assert (
        f"rejected lines: 1 not JSON; they are listed in {shards.parent / 'new' / 'rejected.jsonl'}" in notes
    )
    assert "1 documents have no BOS" in notes
    assert "--add-bos" in notes
    assert "no document fell into the held-out share of 0.005" in notes
    assert _main(["shards", *map(str, [*arguments, "--add-bos", "--overwrite", "--held-out", 0])]) == 0
    notes = capsys.readouterr().err
    assert "BOS" not in notes
    assert "held-out" not in notes
    assert np.asarray(read_split(shards.parent / "new", "train")).tolist() == [1, 300, 301, 2]


def test_the_caller_s_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], shards: Path) -> None:
    out = ["--out", shards.parent / "new"]
    tokenizer = ["--tokenizer", shards.parent / "tokenizer"]
    assert "shards: needs one of info, verify, merge, import, export" in refused(capsys)
    assert "--nodes" in refused(capsys, "export", shards, shards.parent / "new")
    assert "2000 nodes of 8 GPUs" in refused(capsys, "export", shards, shards.parent / "new", "--nodes", 2000)
    assert "no split 'test'" in refused(capsys, "export", shards, "x", "--nodes", 1, "--split", "test")
    assert "no such folder" in refused(capsys, "import", shards.parent / "nowhere", *tokenizer, *out)
    assert "neither node folders" in refused(capsys, "import", shards, *tokenizer, *out)
    assert "tokenizer" in refused(capsys, "import", shards, "--tokenizer", shards, *out)
    assert "at least one folder" in refused(capsys, "merge", *out)
    assert not (shards.parent / "new").exists()
