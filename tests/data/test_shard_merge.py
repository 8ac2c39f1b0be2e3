"""Merging folders of shards: the documents of all of them, in order, without a copy, and refusals that name the part."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mobilellm.data.documents import Document
from mobilellm.data.shard_index import ShardError, read_index, write_index
from mobilellm.data.shard_merge import PART, merge_shards
from mobilellm.data.shards import read_split, verify, write_shards
from tokenizer_oracles import trained


def part(directory: Path, number: int, preparation: dict[str, Any] | None = None) -> Path:
    """Shards of 30 documents with this number in them; `preparation` goes into the index."""
    texts = [f"Part {number}, document {i}: {i * number} words." for i in range(30)]
    documents = [Document("", text) for text in [*texts, texts[0], ""]]
    index = write_shards(directory, documents, trained(), f"source {number % 2}", "ours", held_out=0.2)
    write_index(directory, replace(index, preparation=preparation or {}))
    return directory


def ids(directory: Path, split: str) -> list[int]:
    return np.asarray(read_split(directory, split)).tolist()


def test_merged_is_one_after_the_other(tmp_path: Path) -> None:
    parts = [part(tmp_path / name, number) for number, name in enumerate(("b", "a", "c"))]
    index = merge_shards(parts, tmp_path / "all")
    assert index == read_index(tmp_path / "all")
    verify(tmp_path / "all")
    for split in ("train", "held-out"):
        assert ids(tmp_path / "all", split) == [token for each in parts for token in ids(each, split)]
        for field in ("tokens", "documents", "bytes", "words"):
            assert index.total(split, field) == sum(read_index(each).total(split, field) for each in parts)
    assert [shard.file for shard in index.shards] == [
        *(f"train-{i:05d}.bin" for i in range(3)), *(f"held-out-{i:05d}.bin" for i in range(3)),
    ]  # fmt: skip
    assert index.rejected == {"empty": 3, "duplicate": 3, "not Unicode": 0}
    assert (index.source, index.licence) == ("source 0; source 1", "ours")
    assert index.preparation == {"merged": 3}


def test_files_are_linked_not_copied(tmp_path: Path) -> None:
    parts = [part(tmp_path / str(number), number) for number in range(2)]
    merge_shards(parts, tmp_path / "linked")
    merge_shards(parts, tmp_path / "copied", copy=True)
    for number, each in enumerate(parts):
        assert (tmp_path / "linked" / f"train-{number:05d}.bin").samefile(each / "train-00000.bin")
        copied = tmp_path / "copied" / f"train-{number:05d}.bin"
        assert not copied.samefile(each / "train-00000.bin")
        assert copied.read_bytes() == (each / "train-00000.bin").read_bytes()
    for each in parts:
        shutil.rmtree(each)
    verify(tmp_path / "linked")
    verify(tmp_path / "copied")


def test_a_merged_folder_merges_again_and_replaces_itself(tmp_path: Path) -> None:
    parts = [part(tmp_path / str(number), number) for number in range(3)]
    merge_shards(parts[:2], tmp_path / "all")
    expected = ids(tmp_path / "all", "train") + ids(parts[2], "train")
    with pytest.raises(FileExistsError):
        merge_shards([tmp_path / "all", parts[2]], tmp_path / "all")
    merge_shards([tmp_path / "all", parts[2]], tmp_path / "all", overwrite=True)
    assert ids(tmp_path / "all", "train") == expected
    verify(tmp_path / "all")


def test_parts_of_one_run_come_in_the_order_of_their_ranks(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    names = {0: "z", 1: "part-00001.tmp", 2: "a"}
    for rank, name in names.items():
        part(tmp_path / "parts" / name, rank, {"held_out": 0.2, PART: {"rank": rank, "of": 3}})
    left_behind = part(tmp_path / "parts" / "part-00001.tmp-12-ab", 1, {PART: {"rank": 1, "of": 3}})
    (tmp_path / "parts" / "notes").mkdir()
    index = merge_shards([tmp_path / "parts"], tmp_path / "all")
    expected = [token for rank in range(3) for token in ids(tmp_path / "parts" / names[rank], "train")]
    assert ids(tmp_path / "all", "train") == expected
    assert index.preparation == {"held_out": 0.2, "merged": 3}
    assert left_behind.is_dir()


def test_rejected_lists_are_put_together(tmp_path: Path) -> None:
    parts = [part(tmp_path / str(number), number) for number in range(3)]
    for number in (0, 2):
        (parts[number] / "rejected.jsonl").write_text(
            json.dumps({"reason": "empty", "name": str(number)}) + "\n"
        )
    merge_shards(parts, tmp_path / "all")
    listed = [json.loads(line) for line in (tmp_path / "all" / "rejected.jsonl").read_text().splitlines()]
    assert listed == [{"reason": "empty", "name": "0"}, {"reason": "empty", "name": "2"}]


def test_what_does_not_fit_together_is_refused(tmp_path: Path) -> None:
    def refused(match: str, *parts: Path, kind: type[Exception] = ShardError) -> None:
        with pytest.raises(kind, match=match) as caught:
            merge_shards(parts, tmp_path / "all")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "all").exists()

    run = {rank: part(tmp_path / f"run{rank}", rank, {PART: {"rank": rank, "of": 4}}) for rank in (0, 1, 3)}
    plain, other = part(tmp_path / "plain", 5), part(tmp_path / "other", 6)
    refused("1 parts are missing, the first is 2", *run.values())
    refused("run0: named twice", run[0], run[0], kind=ValueError)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "link").symlink_to(plain)
    refused("link: named twice", plain, tmp_path / "folder", kind=ValueError)
    refused("different runs", run[0], plain)
    refused("no such folder", tmp_path / "nowhere", kind=FileNotFoundError)
    (tmp_path / "nothing").mkdir()
    refused("neither a folder of shards", tmp_path / "nothing", kind=FileNotFoundError)
    refused("at least one", kind=ValueError)
    write_index(other, replace(read_index(other), tokenizer="f" * 64))
    refused("only shards of one tokenizer", plain, other)
    for folder, share in ((plain, 0.1), (run[0], 0.2)):
        write_index(folder, replace(read_index(folder), preparation={"held_out": share}))
    refused("different shares", plain, run[0])
    write_index(run[1], replace(read_index(run[1]), shards=(), preparation={}))
    refused("none of the 1 parts", run[1])
    file = plain / "train-00000.bin"
    file.write_bytes(file.read_bytes()[:-2])
    refused("train-00000.bin: missing or not", plain)


def test_another_file_system_is_told_how_to_mend_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = part(tmp_path / "one", 1)

    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source), None, str(target))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ValueError, match="pass --copy"):
        merge_shards([one], tmp_path / "all")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one"]
    merge_shards([one], tmp_path / "all", copy=True)
    verify(tmp_path / "all")
