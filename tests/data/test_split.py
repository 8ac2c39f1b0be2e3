"""A split over many files is one sequence; the writer's files depend on the documents alone, also after a resume."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.data import shards as shards_module
from mobilellm.data.shards import (
    Shard,
    ShardError,
    ShardWriter,
    Split,
    make_index,
    read_split,
    verify,
    write_index,
)

VOCABULARY = 70_000
DOCUMENTS = st.lists(
    st.tuples(
        st.sampled_from(["train", "held-out", "train", "other"]),
        st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12),
    ),
    min_size=1,
)


def fill(writer: ShardWriter, documents: list[tuple[str, list[int]]]) -> None:
    for split, ids in documents:
        writer.add(split, ids, len(ids), 1)


def write(directory: Path, documents: list[tuple[str, list[int]]], shard_tokens: int) -> tuple[Shard, ...]:
    directory.mkdir(parents=True)
    with ShardWriter(directory, VOCABULARY, shard_tokens) as writer:
        fill(writer, documents)
        shards = writer.finish()
    write_index(directory, make_index(VOCABULARY, "t", "s", "l", {}, shards))
    return shards


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, st.integers(1, 30), st.data())
def test_a_split_is_one_sequence(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[tuple[str, list[int]]],
    shard_tokens: int,
    data: st.DataObject,
) -> None:
    directory = tmp_path_factory.mktemp("split") / "s"
    write(directory, documents, shard_tokens)
    verify(directory)
    name = documents[0][0]
    whole = [token for split, ids in documents if split == name for token in ids]
    split = read_split(directory, name)
    split = pickle.loads(pickle.dumps(split)) if data.draw(st.booleans()) else split
    assert len(split) == split.tokens == split.bytes == len(whole)
    assert split.documents == split.words == sum(chosen == name for chosen, _ in documents)
    assert split.dtype == np.uint32
    assert np.asarray(split).tolist() == split[:].tolist() == list(split) == whole  # type: ignore[call-overload]
    part = data.draw(st.slices(len(whole)))
    assert split[part].tolist() == whole[part]
    assert split[part].dtype == split.dtype
    at = data.draw(st.integers(-len(whole), len(whole) - 1))
    assert split[at] == whole[at]
    assert type(split[at]) is int
    for outside in (len(whole), -len(whole) - 1):
        with pytest.raises(IndexError):
            split[outside]


@settings(deadline=None, max_examples=60)
@given(DOCUMENTS, st.integers(1, 30))
def test_files_roll_over_between_documents(
    tmp_path_factory: pytest.TempPathFactory, documents: list[tuple[str, list[int]]], shard_tokens: int
) -> None:
    directory = tmp_path_factory.mktemp("roll") / "s"
    shards = write(directory, documents, shard_tokens)
    expected: dict[str, list[list[list[int]]]] = {}
    for split, ids in documents:  # by hand
        files = expected.setdefault(split, [[]])
        if sum(map(len, files[-1])) >= shard_tokens:
            files.append([])
        files[-1].append(ids)
    order = [split for split in ("train", "held-out", "other") if split in expected]
    assert [(shard.split, shard.documents, shard.tokens) for shard in shards] == [
        (split, len(file), sum(map(len, file))) for split in order for file in expected[split]
    ]
    for shard in shards:
        file = expected[shard.split][int(shard.file[-9:-4])]
        data = np.array([token for ids in file for token in ids], "<u4").tobytes()
        assert (directory / shard.file).read_bytes() == data
        assert shard.sha256 == hashlib.sha256(data).hexdigest()


@settings(deadline=None, max_examples=40)
@given(DOCUMENTS, st.integers(1, 30), st.data())
def test_a_writer_goes_on_after_a_crash(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[tuple[str, list[int]]],
    shard_tokens: int,
    data: st.DataObject,
) -> None:
    directory = tmp_path_factory.mktemp("crash")
    expected = write(directory / "whole", documents, shard_tokens)
    at = data.draw(st.integers(0, len(documents)))
    later = data.draw(st.integers(at, len(documents)))
    (directory / "s").mkdir()
    with ShardWriter(directory / "s", VOCABULARY, shard_tokens) as writer:
        fill(writer, documents[:at])
        state = json.loads(json.dumps(writer.sync()))
        fill(writer, documents[at:later])  # which the crash makes void
    with ShardWriter.resume(directory / "s", VOCABULARY, state, shard_tokens) as writer:
        fill(writer, documents[at:])
        shards = writer.finish()
    assert shards == expected
    write_index(directory / "s", make_index(VOCABULARY, "t", "s", "l", {}, shards))
    assert contents(directory / "s") == contents(directory / "whole")


@pytest.mark.parametrize("damage", ["missing", "short", "other"])
def test_a_damaged_open_file_is_not_gone_on_with(tmp_path: Path, damage: str) -> None:
    with ShardWriter(tmp_path, VOCABULARY) as writer:
        fill(writer, [("train", [1, 2, 3])])
        state = writer.sync()
    file = tmp_path / "train-00000.bin"
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"\0" * (8 if damage == "short" else 12))
    with pytest.raises(ShardError, match=rf"{file}: .* prepare the data again"):
        ShardWriter.resume(tmp_path, VOCABULARY, state)


@pytest.mark.parametrize("ids", [[-1], [VOCABULARY], [2**40], [5, VOCABULARY, 5]])
def test_ids_outside_the_vocabulary(tmp_path: Path, ids: list[int]) -> None:
    with (
        ShardWriter(tmp_path, VOCABULARY) as writer,
        pytest.raises(ValueError, match="do not lie in the vocabulary"),
    ):
        writer.add("train", ids, 1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("", [1], 1, 1), "split ''"),
        (("../x", [1], 1, 1), "split '../x'"),
        (("train", [], 1, 1), "0 ids are not"),
    ],
)
def test_what_the_writer_refuses(tmp_path: Path, arguments: tuple[Any, ...], words: str) -> None:
    with ShardWriter(tmp_path, VOCABULARY) as writer, pytest.raises(ValueError, match=words):
        writer.add(*arguments)
    assert not list(tmp_path.iterdir())


def test_no_more_files_are_open_than_allowed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_OPEN_FILES", 3)
    write(tmp_path / "s", [("train", [i, i + 1]) for i in range(40)], 2)
    split = read_split(tmp_path / "s", "train")
    order = np.random.default_rng(0).permutation(40).tolist()
    assert [split[2 * i] for i in order] == order
    assert len(split._maps) == 3


def test_the_fingerprint_tells_tokens_apart(tmp_path: Path) -> None:
    def fingerprint(name: str, documents: list[tuple[str, list[int]]]) -> str:
        write(tmp_path / name, documents, 4)
        return read_split(tmp_path / name, "train").fingerprint

    documents = [("train", [1, 2, 3]), ("train", [4, 5]), ("held-out", [6])]
    first = fingerprint("a", documents)
    assert first == fingerprint("b", [*documents[:2], ("held-out", [7])])  # the other split does not count
    assert first != fingerprint("c", [documents[1], documents[0], documents[2]])
    assert first != fingerprint("d", [("train", [1, 2, 9]), *documents[1:]])
    shutil.copytree(tmp_path / "a", tmp_path / "e")
    assert first == read_split(tmp_path / "e", "train").fingerprint


def test_a_file_cut_short_while_the_split_is_open(tmp_path: Path) -> None:
    write(tmp_path / "s", [("train", [1, 2, 3])], 4)
    split = read_split(tmp_path / "s", "train")
    (tmp_path / "s" / "train-00000.bin").write_bytes(b"\0" * 4)
    with pytest.raises(ShardError, match="train-00000.bin: not 3 tokens long"):
        split[0]


def test_a_split_cannot_be_written_to(tmp_path: Path) -> None:
    write(tmp_path / "s", [("train", [1, 2, 3])], 4)
    split = read_split(tmp_path / "s", "train")
    assert isinstance(split, Split)
    with pytest.raises(ValueError, match="read-only"):
        split[:2][0] = 5
