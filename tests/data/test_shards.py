"""Shards: what is written is what was tokenised, the index counts right, and damage is seen."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.data.documents import Document
from mobilellm.data.shards import (
    FORMAT,
    ShardError,
    ShardIndex,
    read_index,
    read_split,
    verify,
    write_shards,
)
from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPACE
from mobilellm.tokenizer import BOS_ID, EOS_ID, Tokenizer
from tokenizer_oracles import TEXTS, trained

STORIES = [
    Document(f"story {i}", f"Story {i}.\nIt has {i * i} words,\n\nor é {i}.") for i in range(300)
]  # more than are encoded at once


def write(directory: Path, documents: list[Document] = STORIES, **changes: Any) -> ShardIndex:
    arguments = {"tokenizer": trained(), "source": "stories", "licence": "ours"} | changes
    return write_shards(directory, documents, **arguments)


def texts_of(directory: Path, split: str, tokenizer: Tokenizer | None = None) -> list[str]:
    """The documents of a split, cut at BOS and EOS and decoded."""
    tokenizer = tokenizer or trained()
    ids = read_split(directory, split, tokenizer)[:].tolist()
    documents: list[list[int]] = []
    while ids:
        end = ids.index(EOS_ID)
        assert ids[0] == BOS_ID
        assert BOS_ID not in ids[1:end]
        documents.append(ids[1:end])
        ids = ids[end + 1 :]
    return [tokenizer.decode(document) for document in documents]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write(tmp_path / "shards")
    return tmp_path / "shards"


def test_what_is_written_comes_back(shards: Path) -> None:
    train, held_out = texts_of(shards, "train"), texts_of(shards, "held-out")
    everything = [document.text for document in STORIES]
    assert train == [text for text in everything if text in train]  # in the order given
    assert held_out == [text for text in everything if text in held_out]
    assert sorted(train + held_out) == sorted(everything)  # hence none on both sides
    verify(shards)


@settings(deadline=None, max_examples=30)
@given(st.lists(TEXTS.filter(str.strip), min_size=2, unique=True))
def test_any_text_comes_back(tmp_path_factory: pytest.TempPathFactory, texts: list[str]) -> None:
    directory = tmp_path_factory.mktemp("any") / "shards"
    write(directory, [Document("", text) for text in texts], held_out=0.4)
    read = texts_of(directory, "train") + texts_of(directory, "held-out")
    assert sorted(read) == sorted(text.replace(SPACE, " ") for text in texts)  # as in SentencePiece


def test_the_index_counts_by_hand(tmp_path: Path) -> None:
    rows = {  # text: words, bytes
        "One two  three.": (3, 15),
        "Zoë": (1, 4),
        "日本語 \n\t text 🙂": (3, 9 + 4 + 4 + 1 + 4),
        " x ": (1, 3),
    }
    twice_and_empty = [*rows, "Zoë", "", " \n", "Zoë"]
    index = write(tmp_path / "s", [Document("", text) for text in twice_and_empty], held_out=0.5)
    assert index == read_index(tmp_path / "s")
    assert (index.format, index.dtype, index.vocab_size) == (FORMAT, "<u2", 700)
    assert (index.tokenizer, index.source, index.licence) == (trained().fingerprint, "stories", "ours")
    assert index.rejected == {"empty": 2, "duplicate": 2, "not Unicode": 0}
    assert [shard.split for shard in index.shards] == ["train", "held-out"]
    for shard in index.shards:
        texts = texts_of(tmp_path / "s", shard.split)
        assert shard.documents == len(texts) > 0
        assert shard.words == sum(rows[text][0] for text in texts)
        assert shard.bytes == sum(rows[text][1] for text in texts)
        assert shard.tokens == sum(len(trained().encode(text, bos=False)) + 2 for text in texts)
        file = tmp_path / "s" / shard.file
        assert file.stat().st_size == 2 * shard.tokens
        assert shard.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
    for field, total in {"documents": 4, "words": 8, "bytes": 44}.items():
        assert index.total("train", field) + index.total("held-out", field) == total


def test_the_files_are_little_endian_numbers(shards: Path) -> None:
    data = (shards / "train-00000.bin").read_bytes()
    numbers = [data[i] + 256 * data[i + 1] for i in range(0, len(data), 2)]
    assert numbers == read_split(shards, "train")[:].tolist()


@cache
def tokenizer_of_size(size: int) -> Tokenizer:
    letters = (chr(code) for code in range(0x100, 0x20000) if not 0xD800 <= code < 0xE000)
    pieces = [*LAYOUT_HEAD, SPACE, *(letter for letter in letters if letter != SPACE)]
    return Tokenizer(pieces[:size], [])


@pytest.mark.parametrize(("size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_the_smallest_type_that_holds_every_id(tmp_path: Path, size: int, dtype: str) -> None:
    tokenizer = tokenizer_of_size(size)
    last = tokenizer.pieces[-1]
    index = write(tmp_path / "s", [Document("", last), Document("", last * 2)], tokenizer=tokenizer)
    assert index.dtype == dtype
    ids = np.concatenate([read_split(tmp_path / "s", split, tokenizer) for split in ("train", "held-out")])
    assert ids.max() == size - 1
    assert (ids == size - 1).sum() == 3
    assert sorted(texts_of(tmp_path / "s", "train", tokenizer) + texts_of(tmp_path / "s", "held-out", tokenizer)) == [last, last * 2]  # fmt: skip


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_the_split_depends_on_the_text_alone(tmp_path: Path) -> None:
    documents = [Document("", f"document number {i}") for i in range(1000)]
    write(tmp_path / "a", documents, held_out=0.1)
    write(tmp_path / "b", documents[::-1] + documents, held_out=0.1)  # another order, all of it twice
    held_out = texts_of(tmp_path / "a", "held-out")
    assert sorted(held_out) == sorted(texts_of(tmp_path / "b", "held-out"))
    assert 60 < len(held_out) < 140
    write(tmp_path / "c", documents, held_out=0.2)
    assert set(held_out) < set(texts_of(tmp_path / "c", "held-out"))


@pytest.mark.parametrize("held_out", [1e-9, 0.05, 1 - 1e-9])
@pytest.mark.parametrize("count", [2, 3, 20])
def test_both_sides_have_something(tmp_path: Path, held_out: float, count: int) -> None:
    for attempt in range(5):
        documents = [Document("", f"{attempt} {i}") for i in range(count)]
        index = write(tmp_path / f"{attempt}", documents, held_out=held_out)
        assert index.total("train", "documents") + index.total("held-out", "documents") == count
        assert {shard.split for shard in index.shards if shard.documents} == {"train", "held-out"}


@pytest.mark.parametrize("documents", [[], ["only one"], ["one twice", "one twice", ""], ["", " "]], ids=str)
def test_refuses_too_few_documents(tmp_path: Path, documents: list[str]) -> None:
    with pytest.raises(ShardError, match="stories: . different documents with text .* give more text"):
        write(tmp_path / "s", [Document("", text) for text in documents])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("held_out", [0, 1, -0.1, 1.5, float("nan")])
def test_refuses_a_share_that_is_none(tmp_path: Path, held_out: float) -> None:
    with pytest.raises(ValueError, match=f"held_out = {held_out} must lie between 0 and 1"):
        write(tmp_path / "s", held_out=held_out)


def test_text_that_is_no_unicode_is_counted(tmp_path: Path) -> None:
    index = write(tmp_path / "s", [*STORIES, Document("", "half \ud83d"), Document("", "half ?")])
    assert index.rejected == {"empty": 0, "duplicate": 0, "not Unicode": 1}
    assert index.total("train", "documents") + index.total("held-out", "documents") == 301


def test_names_with_odd_characters_are_kept(tmp_path: Path) -> None:
    write(tmp_path / "s", source="Bücher\udcff", licence="日本")
    assert read_index(tmp_path / "s").source == "Bücher\udcff"


def test_the_first_format_is_still_read(shards: Path) -> None:
    before = read_split(shards, "train")[:].tolist()
    file = shards / "index.json"
    values = json.loads(file.read_text())
    del values["preparation"]
    file.write_text(json.dumps(values | {"format": "mobilellm-shards-1"}))
    assert read_split(shards, "train", trained())[:].tolist() == before
    assert read_index(shards).preparation == {}
    verify(shards)


# Damage


@pytest.fixture(scope="module")
def written_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("once") / "shards"
    write(directory)
    return directory


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_one_flipped_bit_is_caught(
    written_once: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    directory = tmp_path_factory.mktemp("flip") / "shards"
    shutil.copytree(written_once, directory)
    file = directory / data.draw(st.sampled_from(["train-00000.bin", "held-out-00000.bin"]))
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    with pytest.raises(ShardError, match=f"{re.escape(str(file))}: its bytes are not those"):
        verify(directory)


@pytest.mark.parametrize("change", ["shorter", "longer", "missing", "directory"])
def test_missing_and_shortened_files(shards: Path, change: str) -> None:
    file = shards / "held-out-00000.bin"
    content = file.read_bytes()
    file.unlink()
    if change == "directory":
        file.mkdir()
    elif change != "missing":
        file.write_bytes(content[:-2] if change == "shorter" else content + b"\0\0")
    with pytest.raises(ShardError, match=f"{re.escape(str(file))}: missing or not .* prepare the data again"):
        read_split(shards, "held-out")
    with pytest.raises(ShardError, match=re.escape(str(file))):
        verify(shards)
    read_split(shards, "train")  # the other side is whole


def test_another_tokenizer(shards: Path) -> None:
    other = tokenizer_of_size(65_536)
    with pytest.raises(ShardError, match=f"made with tokenizer {trained().fingerprint[:12]}…, not with this"):
        read_split(shards, "train", other)


def test_no_folder_of_shards(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "missing"):
        with pytest.raises(FileNotFoundError, match="no index.json there"):
            read_split(directory, "train")


def test_an_unknown_split(shards: Path) -> None:
    with pytest.raises(ShardError, match="has no split 'test'; it has held-out, train"):
        read_split(shards, "test")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "mobilellm-shards-3", "new": 1}, "format 'mobilellm-shards-3' is not"),
        ({"format": None}, "format None is not"),
        ({"dtype": "<f4"}, "dtype = '<f4' must be one of"),
        ({"dtype": 7}, "dtype = 7 must be text"),
        ({"dtype": "nonsense"}, "dtype = 'nonsense'"),
        ({"vocab_size": "700"}, "vocab_size = '700' must be a whole number"),
        ({"tokenizer": None}, "tokenizer = None must be text"),
        ({"rejected": []}, "rejected = "),
        ({"preparation": 1}, "preparation = 1 must be values by name"),
        ({"extra": 1}, "extra"),
        ({"shards": []}, "lists no shards"),
        ({"shards": None}, "not a shard index"),
        ({"shards": [1]}, "not a shard index"),
    ],
    ids=str,
)
def test_an_index_with_other_values(shards: Path, change: dict[str, Any], words: str) -> None:
    file = shards / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ShardError, match=f"{re.escape(str(file))}: .*{re.escape(words)}.* the data again"):
        read_split(shards, "train")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tokens": -4}, "tokens = -4"),
        ({"tokens": 1.5}, "tokens = 1.5"),
        ({"tokens": True}, "tokens = True"),
        ({"file": "../train-00000.bin"}, "file = '../train-00000.bin' must be the name"),
        ({"file": ".."}, "file = '..'"),
        ({"file": ""}, "file = ''"),
        ({"file": 5}, "file = 5 must be text"),
        ({"sha256": None}, "sha256 = None"),
        ({"colour": "red"}, "colour"),
    ],
    ids=str,
)
def test_a_shard_entry_with_other_values(shards: Path, change: dict[str, Any], words: str) -> None:
    file = shards / "index.json"
    values = json.loads(file.read_text())
    values["shards"][0] |= change
    file.write_text(json.dumps(values))
    with pytest.raises(ShardError, match=re.escape(words)):
        read_index(shards)


def test_an_index_without_a_key(shards: Path) -> None:
    file = shards / "index.json"
    whole = json.loads(file.read_text())
    for key in whole:
        file.write_text(json.dumps({name: value for name, value in whole.items() if name != key}))
        with pytest.raises(ShardError, match=key):
            read_index(shards)
    for key in whole["shards"][0]:
        first = {name: value for name, value in whole["shards"][0].items() if name != key}
        file.write_text(json.dumps(whole | {"shards": [first, whole["shards"][1]]}))
        with pytest.raises(ShardError, match=key):
            read_index(shards)


def test_an_index_cut_short(shards: Path) -> None:
    file = shards / "index.json"
    content = file.read_bytes()
    for length in range(0, len(content.rstrip()) - 1, 7):
        file.write_bytes(content[:length])
        with pytest.raises(ShardError, match="not JSON"):
            read_index(shards)
    for other in (b"\xff\xfe", b"[" * 100_000, b"[]", b'"text"', b"null"):
        file.write_bytes(other)
        with pytest.raises(ShardError, match=re.escape(str(file))):
            read_index(shards)


# Nothing is lost


def test_what_is_there_is_not_overwritten_unasked(shards: Path) -> None:
    before = contents(shards)

    def documents() -> Iterator[Document]:
        raise AssertionError("refused only after the work")
        yield

    with pytest.raises(FileExistsError, match=re.escape(str(shards))):
        write_shards(shards, documents(), trained(), "stories", "ours")
    assert contents(shards) == before
    index = write(shards, STORIES[:10], overwrite=True)
    assert index.total("train", "documents") + index.total("held-out", "documents") == 10
    verify(shards)


def test_a_source_that_fails_half_way_changes_nothing(shards: Path) -> None:
    before = contents(shards)

    def documents() -> Iterator[Document]:
        yield from STORIES
        raise FileNotFoundError("gone")

    with pytest.raises(FileNotFoundError, match="gone"):
        write_shards(shards, documents(), trained(), "stories", "ours", overwrite=True)
    assert contents(shards) == before
    assert list(shards.parent.iterdir()) == [shards]


def test_a_full_disk_leaves_the_old_shards(shards: Path) -> None:
    before = contents(shards)
    script = """
import resource, sys
from pathlib import Path
from mobilellm.data.documents import Document
from mobilellm.data.shards import write_shards
from mobilellm.tokenizer import Tokenizer
tokenizer = Tokenizer.load(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
documents = [Document("", f"text {i} " * 50) for i in range(300)]  # more than are encoded at once
try:
    write_shards(Path(sys.argv[2]), documents, tokenizer, "", "", overwrite=True)
except OSError as error:
    print(error.filename, error.strerror)
"""
    trained().save(shards.parent / "tokenizer")
    done = subprocess.run(
        [sys.executable, "-c", script, str(shards.parent / "tokenizer"), str(shards)],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env=os.environ,
    )
    assert done.stdout == f"{shards} File too large\n"
    assert contents(shards) == before
    assert sorted(path.name for path in shards.parent.iterdir()) == ["shards", "tokenizer"]
