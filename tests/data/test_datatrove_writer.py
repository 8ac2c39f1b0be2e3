"""datatrove's local executor writes the tokens that `write_shards` writes, and goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("datatrove", reason="needs mobilellm[datatrove]")
pytest.importorskip("orjson", reason="needs mobilellm[datatrove]")

from datatrove.data import Document as TroveDocument
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader

from mobilellm.data.datatrove_writer import MergeShards, ShardsWriter
from mobilellm.data.documents import Document
from mobilellm.data.prepare import prepare
from mobilellm.data.prepare_settings import PrepareSettings
from mobilellm.data.shard_index import ShardError, read_index
from mobilellm.data.shard_merge import merge_shards
from mobilellm.data.shards import read_split, verify, write_shards
from mobilellm.tokenizer import EOS_ID, Tokenizer
from tokenizer_oracles import trained

HELD_OUT = 0.2
TEXTS = [f"Document {i}.\nIt has {i * i} words, or é {i}." for i in range(400)]


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    trained().save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def corpus(directory: Path, files: int, texts: list[str]) -> Path:
    directory.mkdir()
    for number in range(files):
        lines = [
            json.dumps({"id": f"{number}/{i}", "text": text}) for i, text in enumerate(texts[number::files])
        ]
        (directory / f"{number}.jsonl").write_text("\n".join(lines) + "\n")
    return directory


def executor(tmp_path: Path, tokenizer: Path, tasks: int = 2, **settings: Any) -> LocalPipelineExecutor:
    return LocalPipelineExecutor(
        [
            JsonlReader(str(tmp_path / "corpus")),
            ShardsWriter(tmp_path / "parts", tokenizer, "test", "ours", HELD_OUT, **settings),
        ],
        tasks=tasks,
        workers=1,
        logging_dir=str(tmp_path / "logs"),
    )


def documents(directory: Path, split: str) -> list[tuple[int, ...]]:
    ids = np.asarray(read_split(directory, split))
    parts = np.split(ids, np.flatnonzero(ids == EOS_ID) + 1)
    return [tuple(part.tolist()) for part in parts if len(part)]


def test_token_for_token_what_write_shards_writes(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path / "corpus", 2, TEXTS)
    executor(tmp_path, tokenizer).run()
    merged = merge_shards([tmp_path / "parts"], tmp_path / "shards")
    verify(tmp_path / "shards")
    expected = write_shards(
        tmp_path / "expected", [Document("", text) for text in TEXTS], trained(), "test", "ours", HELD_OUT
    )
    for split in ("train", "held-out"):
        found = documents(tmp_path / "shards", split)
        assert sorted(found) == sorted(documents(tmp_path / "expected", split))
        by_rank = [documents(tmp_path / "parts" / f"part-{rank:05d}", split) for rank in range(2)]
        assert found == by_rank[0] + by_rank[1]
        for field in ("tokens", "documents", "bytes", "words"):
            assert merged.total(split, field) == expected.total(split, field)
    # the order within a task is that of its file
    even = [tuple(trained().encode(text, eos=True)) for text in TEXTS[::2]]
    assert by_rank[0] == [ids for ids in even if ids in set(by_rank[0])]
    assert (merged.tokenizer, merged.source, merged.licence) == (trained().fingerprint, "test", "ours")
    assert merged.preparation == {"held_out": HELD_OUT, "deduplicate": "within each part", "merged": 2}
    assert Tokenizer.load(tmp_path / "shards" / "tokenizer").fingerprint == trained().fingerprint


def test_token_for_token_what_prepare_writes(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path / "corpus", 2, [*TEXTS, " \n", "naïve ▁ — 中文 🙂\x00", "a  b\n\n   c\t"])
    executor(tmp_path, tokenizer).run()
    merged = merge_shards([tmp_path / "parts"], tmp_path / "shards")
    settings = PrepareSettings(held_out=HELD_OUT, source="test", licence="ours")
    expected = prepare(
        [str(tmp_path / "corpus")], trained(), tmp_path / "expected", settings, workers=1
    ).index
    for split in ("train", "held-out"):
        found = documents(tmp_path / "shards", split)
        assert found == documents(tmp_path / "expected", split)  # two files, two tasks: the order is the same
        for field in ("tokens", "documents", "bytes", "words"):
            assert merged.total(split, field) == expected.total(split, field)
    assert merged.rejected == expected.rejected == {"empty": 1}


def test_a_second_run_does_only_what_is_missing(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path / "corpus", 2, TEXTS)
    executor(tmp_path, tokenizer).run()
    parts = [tmp_path / "parts" / f"part-{rank:05d}" for rank in range(2)]
    before = [(part / "index.json").stat().st_ino for part in parts]
    content = (parts[1] / "train-00000.bin").read_bytes()
    executor(tmp_path, tokenizer).run()
    assert [(part / "index.json").stat().st_ino for part in parts] == before
    # as if task 1 had been killed: not marked as done, a part half written, another one left behind
    (tmp_path / "logs" / "completions" / "00001").unlink()
    left_behind = tmp_path / "parts" / "part-00001.tmp-1-0a"
    shutil.move(parts[1], left_behind)
    with pytest.raises(ShardError, match="1 parts are missing, the first is 1"):
        merge_shards([tmp_path / "parts"], tmp_path / "shards")
    executor(tmp_path, tokenizer).run()
    assert (parts[0] / "index.json").stat().st_ino == before[0]
    assert (parts[1] / "train-00000.bin").read_bytes() == content
    assert not left_behind.exists()
    merge_shards([tmp_path / "parts"], tmp_path / "shards")


def test_what_is_rejected_is_counted_and_listed(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path / "corpus", 2, [*TEXTS[:40], TEXTS[0], TEXTS[0], TEXTS[0], " \n", "\t"])
    executor(tmp_path, tokenizer).run()
    merged = merge_shards([tmp_path / "parts"], tmp_path / "shards")
    # documents 40 and 42 are in the file of document 0; 41 is in the other, where it is the first of its kind
    assert merged.rejected == {"empty": 2, "duplicate": 2}
    assert sum(merged.total(split, "documents") for split in ("train", "held-out")) == 41
    listed = [json.loads(line) for line in (tmp_path / "shards" / "rejected.jsonl").read_text().splitlines()]
    files = [str(tmp_path / "corpus" / f"{number}.jsonl") for number in range(2)]
    assert listed == [
        {"file": files[0], "document": "0/20", "reason": "duplicate", "text": TEXTS[0]},
        {"file": files[0], "document": "0/21", "reason": "duplicate", "text": TEXTS[0]},
        {"file": files[0], "document": "0/22", "reason": "empty", "text": "\t"},
        {"file": files[1], "document": "1/21", "reason": "empty", "text": " \n"},
    ]
    # the copy in the other part stands on the same side
    copies = [
        document for split in ("train", "held-out") for document in set(documents(tmp_path / "shards", split))
    ]
    assert len(copies) == len(set(copies)) == 40


def run_step(step: ShardsWriter, texts: list[str], rank: int = 0, world_size: int = 1) -> list[TroveDocument]:
    given = [TroveDocument(text=text, id=str(i)) for i, text in enumerate(texts)]
    return list(step.run(iter(given), rank, world_size))


def test_duplicates_are_kept_if_asked_and_documents_handed_on(tmp_path: Path, tokenizer: Path) -> None:
    step = ShardsWriter(tmp_path / "parts", tokenizer, "test", held_out=0, drop_duplicates=False)
    handed_on = run_step(step, ["one", "one", "\ud800", ""])
    assert [document.text for document in handed_on] == ["one", "one", "\ud800", ""]
    index = read_index(tmp_path / "parts" / "part-00000")
    assert index.total("train", "documents") == 2
    assert index.rejected == {"empty": 1, "not Unicode": 1}
    assert index.preparation["deduplicate"] is False


def test_more_tasks_than_files(tmp_path: Path, tokenizer: Path) -> None:
    corpus(tmp_path / "corpus", 1, TEXTS[:50])
    executor(tmp_path, tokenizer, tasks=3).run()
    assert read_index(tmp_path / "parts" / "part-00002", may_be_empty=True).shards == ()
    with pytest.raises(ShardError, match="lists no shards"):
        read_index(tmp_path / "parts" / "part-00002")
    merged = merge_shards([tmp_path / "parts"], tmp_path / "shards")
    assert sum(shard.documents for shard in merged.shards) == 50
    assert merged.preparation["merged"] == 3


def test_a_failing_pipeline_leaves_no_part(tmp_path: Path, tokenizer: Path) -> None:
    def failing() -> Iterator[TroveDocument]:
        yield from (TroveDocument(text=text, id=text) for text in TEXTS)
        raise OSError("the input is gone")

    step = ShardsWriter(tmp_path / "parts", tokenizer, "test")
    with pytest.raises(OSError, match="the input is gone"):
        list(step.run(failing()))
    assert list((tmp_path / "parts").iterdir()) == []


def test_the_merging_step(tmp_path: Path, tokenizer: Path) -> None:
    for rank in range(2):
        run_step(
            ShardsWriter(tmp_path / "parts", tokenizer, "test", held_out=HELD_OUT), TEXTS[rank::2], rank, 2
        )
    step = MergeShards(tmp_path / "parts", tmp_path / "shards")
    with pytest.raises(ValueError, match="tasks=1"):
        step.run(None, 0, 2)
    for _ in range(2):  # killed after the work and before it was marked as done, it runs again
        LocalPipelineExecutor([step], tasks=1, logging_dir=str(tmp_path / "logs"), skip_completed=False).run()
    assert sum(shard.documents for shard in read_index(tmp_path / "shards").shards) == len(TEXTS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "diary.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds something else"):
        MergeShards(tmp_path / "parts", tmp_path / "other").run()
    write_shards(
        tmp_path / "shards", [Document("", "a"), Document("", "b")], trained(), "", "", overwrite=True
    )
    before = read_index(tmp_path / "shards")
    with pytest.raises(FileExistsError, match="holds something else"):
        step.run()
    assert read_index(tmp_path / "shards") == before


def test_wrong_settings_are_refused_before_the_pipeline_starts(tmp_path: Path, tokenizer: Path) -> None:
    with pytest.raises(ValueError, match="held_out = 1"):
        ShardsWriter(tmp_path, tokenizer, "test", held_out=1)
    with pytest.raises(ValueError, match="memory-mapped files"):
        ShardsWriter("s3://bucket/parts", tokenizer, "test")
