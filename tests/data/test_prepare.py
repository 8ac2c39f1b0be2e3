"""Preparation: the same bytes with any number of workers, chunks and crashes; nothing lost, nothing silent."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from preparations import InlineWorkers, contents, texts_of, write_corpus

from mobilellm.data import journal, shard_writer
from mobilellm.data import prepare as prepare_module
from mobilellm.data.documents import Document
from mobilellm.data.prepare import Prepared, Stopped, prepare
from mobilellm.data.prepare_settings import PrepareSettings
from mobilellm.data.quality import QualityRules
from mobilellm.data.sample import sample_texts
from mobilellm.data.shards import ShardError, read_index, verify, write_shards
from mobilellm.tokenizer import Tokenizer
from tokenizer_oracles import TEXTS, small, trained

EXPECTED_REJECTIONS = {"duplicate": 8, "unreadable line": 8, "not text": 8, "no text field": 8, "empty": 8}


@pytest.fixture(autouse=True)
def inline(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes only where a test is about them."""
    if "processes" not in request.fixturenames:
        monkeypatch.setattr(prepare_module, "Workers", InlineWorkers)


@pytest.fixture
def processes() -> None:
    pass


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("corpus") / "corpus"
    return folder, write_corpus(folder)


@pytest.fixture(scope="module")
def expected(corpus: tuple[Path, list[str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of an undisturbed run with small shards."""
    out = tmp_path_factory.mktemp("expected") / "shards"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "Workers", InlineWorkers)
        run(corpus[0], out, shard_tokens=2000, held_out=0.1)
    return contents(out)


def run(
    where: Path | list[str],
    out: Path,
    tokenizer: Tokenizer | None = None,
    call: dict[str, Any] | None = None,
    **settings: Any,
) -> Prepared:
    inputs = where if isinstance(where, list) else [str(where)]
    return prepare(
        inputs, tokenizer or trained(), out, PrepareSettings(**settings), **({"workers": 1} | (call or {}))
    )


def rejected(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]


# What comes out


def test_everything_is_kept_or_listed(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, texts = corpus
    index = run(
        folder, tmp_path / "out", shard_tokens=2000, held_out=0.1, licence="ours", source="made up"
    ).index
    assert index == read_index(tmp_path / "out")
    assert (index.source, index.licence, index.tokenizer) == ("made up", "ours", trained().fingerprint)
    assert index.rejected == EXPECTED_REJECTIONS
    train, held_out = (texts_of(tmp_path / "out", split, trained()) for split in ("train", "held-out"))
    assert train == [text for text in texts if text in set(train)]  # in the order of the input
    assert held_out == [text for text in texts if text in set(held_out)]
    assert sorted(train + held_out) == sorted(texts)
    assert len(index.shards) > 5
    verify(tmp_path / "out")
    listed = rejected(tmp_path / "out")
    assert len(listed) == sum(EXPECTED_REJECTIONS.values())
    lines = {name: (folder / name).read_text().splitlines() for name in ("a.jsonl", "b.jsonl")}
    for entry in listed:
        line = lines[Path(entry["file"]).name][entry["line"] - 1]
        assert entry["text"] in line or json.loads(line)["text"].startswith(entry["text"])
    assert [entry["reason"] for entry in listed[:5]] == [
        "duplicate",
        "unreadable line",
        "not text",
        "no text field",
        "empty",
    ]
    assert Tokenizer.load(tmp_path / "out" / "tokenizer").fingerprint == trained().fingerprint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(TEXTS, min_size=1, max_size=30), st.floats(0.01, 0.99), st.integers(1, 300), st.integers(1, 500)
)
def test_the_same_shards_as_in_memory(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    held_out: float,
    chunk_bytes: int,
    shard_tokens: int,
) -> None:
    """`write_shards` and `prepare` are two ways to the same bytes: the rule of the split, one side empty included."""
    folder = tmp_path_factory.mktemp("same")
    (folder / "x.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    documents = [Document("", text) for text in texts]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module, "Workers", InlineWorkers)
        call = {"chunk_bytes": chunk_bytes}
        try:
            in_memory = write_shards(folder / "memory", documents, trained(), "s", "l", held_out)
        except ShardError:
            with pytest.raises(ShardError, match="at least 2 are needed"):
                run(folder / "x.jsonl", folder / "out", held_out=held_out, call=call)
            assert sorted(path.name for path in folder.iterdir()) == ["x.jsonl"]
            return
        index = run(folder / "x.jsonl", folder / "out", held_out=held_out, call=call).index
        assert index.shards == in_memory.shards
        assert {reason: count for reason, count in in_memory.rejected.items() if count} == index.rejected
        run(folder / "x.jsonl", folder / "small", held_out=held_out, shard_tokens=shard_tokens, call=call)
    for split in ("train", "held-out"):
        assert texts_of(folder / "small", split, trained()) == texts_of(folder / "memory", split, trained())
    verify(folder / "small")


@pytest.mark.parametrize("chunk_bytes", [1, 100, 5000, 10**6])
def test_chunks_leave_no_trace(
    corpus: tuple[Path, list[str]], expected: dict[str, bytes], tmp_path: Path, chunk_bytes: int
) -> None:
    run(corpus[0], tmp_path / "out", shard_tokens=2000, held_out=0.1, call={"chunk_bytes": chunk_bytes})
    assert contents(tmp_path / "out") == expected


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_workers_leave_no_trace(
    corpus: tuple[Path, list[str]], expected: dict[str, bytes], tmp_path: Path, workers: int, processes: None
) -> None:
    call = {"workers": workers, "chunk_bytes": 1000}
    run(corpus[0], tmp_path / "out", shard_tokens=2000, held_out=0.1, call=call)
    assert contents(tmp_path / "out") == expected


def test_packed_files_parquet_and_standard_input_give_the_same_text(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bz2
    import gzip
    import lzma

    import zstandard

    content = (corpus[0] / "a.jsonl").read_bytes()
    texts = [record["text"] for line in content.splitlines() if (record := _record(line))]
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(content))
    (tmp_path / "x.jsonl.bz2").write_bytes(bz2.compress(content))
    (tmp_path / "x.jsonl.zst").write_bytes(zstandard.compress(content))
    pq.write_table(pa.table({"text": texts}), tmp_path / "x.parquet")
    (tmp_path / "x.txt").write_text("<|end|>\n".join(texts), newline="")
    (tmp_path / "nameless").write_bytes(content)
    inputs: dict[str, dict[str, Any]] = {
        name: {} for name in ("x.jsonl.gz", "x.jsonl.xz", "x.jsonl.bz2", "x.jsonl.zst")
    }
    inputs |= {
        "x.parquet": {},
        "x.txt": {"separator": "<|end|>"},
        "nameless": {"format": "jsonl"},
        "-": {"format": "jsonl"},
    }
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    shards = {}
    for name, changes in inputs.items():
        out = tmp_path / "out" / name
        out.parent.mkdir(exist_ok=True)
        source = name if name == "-" else str(tmp_path / name)
        shards[name] = run([source], out, call={"chunk_bytes": 1000}, **changes).index.shards
    assert len(set(shards.values())) == 1
    train = texts_of(tmp_path / "out" / "x.parquet", "train", trained())
    assert len(train) > 100
    assert set(train) < set(texts)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record.get("text"), str) and record["text"].strip() else None


def test_both_sides_of_a_large_corpus_by_hash(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": f"text number {i}"}) for i in range(2000))
    )
    first = run(tmp_path / "x.jsonl", tmp_path / "a", held_out=0.1).index
    assert 140 < first.total("held-out", "documents") < 260
    lines = (tmp_path / "x.jsonl").read_text().splitlines()
    (tmp_path / "y.jsonl").write_text("\n".join(lines[::-1] + lines))
    second = run(tmp_path / "y.jsonl", tmp_path / "b", held_out=0.1).index
    assert second.rejected == {"duplicate": 2000}
    held_out = [set(texts_of(tmp_path / name, "held-out", trained())) for name in "ab"]
    assert held_out[0] == held_out[1]


# What is left out


def test_filters_count_and_list(tmp_path: Path) -> None:
    good = [
        f"It was the {i}th day of a long journey through hills and valleys, said traveller {i * i}."
        for i in range(9)
    ]
    bad = {
        "too short": "short",
        "too long": "long " * 100,
        "quality: min_lettered_words": "1 2 3 4 5 6 7 8 9 0 1 2 3",
    }
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in [*bad.values(), *good])
    )
    rules = QualityRules(min_characters=0)
    index = run(
        tmp_path / "x.jsonl", tmp_path / "out", min_characters=6, max_characters=200, quality=rules
    ).index
    assert index.rejected == dict.fromkeys(bad, 1)
    assert [(entry["line"], entry["reason"]) for entry in rejected(tmp_path / "out")] == list(
        enumerate(bad, 1)
    )
    assert index.total("train", "documents") + index.total("held-out", "documents") == 9
    assert index.preparation["quality"]["min_characters"] == 0
    everything = run(tmp_path / "x.jsonl", tmp_path / "all").index
    assert everything.rejected == {}


def test_near_duplicates(tmp_path: Path) -> None:
    generator = random.Random(1)
    texts = [" ".join(f"w{generator.randrange(5000)}" for _ in range(300)) for _ in range(20)]
    copies = [text.replace(text.split()[150], "changed") for text in texts[:5]]
    copies_of_copies = [text.replace(text.split()[20], "again") for text in copies]
    (tmp_path / "x.jsonl").write_text(
        "\n".join(json.dumps({"text": text}) for text in [*texts, *copies, texts[0], *copies_of_copies])
    )
    index = run(tmp_path / "x.jsonl", tmp_path / "out", near_duplicates=0.7, call={"chunk_bytes": 3000}).index
    assert index.rejected == {"near duplicate": 10, "duplicate": 1}
    kept = texts_of(tmp_path / "out", "train", trained()) + texts_of(tmp_path / "out", "held-out", trained())
    assert sorted(kept) == sorted(texts)  # the first of each
    assert run(tmp_path / "x.jsonl", tmp_path / "without").index.rejected == {"duplicate": 1}
    alone = run(tmp_path / "x.jsonl", tmp_path / "alone", near_duplicates=0.7, deduplicate=False).index
    assert alone.rejected == {"near duplicate": 11}
    kept_all = run(tmp_path / "x.jsonl", tmp_path / "kept", deduplicate=False).index
    assert kept_all.rejected == {}


def test_near_duplicates_beside_chunks_without_a_document(tmp_path: Path) -> None:
    """As a damaged or empty file, or a megabyte of bad lines."""
    texts = write_corpus(tmp_path / "in", 40)
    (tmp_path / "in" / "d.jsonl").write_text("no JSON\n" * 3)
    (tmp_path / "in" / "e.txt").write_text("")
    (tmp_path / "in" / "f.parquet").write_text("damaged")
    for chunk_bytes in (1, 10**6):
        done = run(
            tmp_path / "in",
            tmp_path / f"{chunk_bytes}",
            near_duplicates=0.9,
            call={"chunk_bytes": chunk_bytes},
        )
        assert done.index.rejected["unreadable line"] >= 3
        assert sum(done.index.total(split, "documents") for split in ("train", "held-out")) == len(texts)
    assert contents(tmp_path / "1") == contents(tmp_path / "1000000")


@pytest.mark.parametrize("chunk_bytes", [1, 300, 10**6])
@pytest.mark.parametrize("limit", [2, 17, 160, 301])
def test_a_limit_counts_documents(
    corpus: tuple[Path, list[str]], tmp_path: Path, limit: int, chunk_bytes: int
) -> None:
    run(corpus[0], tmp_path / "out", limit=limit, held_out=0.1, call={"chunk_bytes": chunk_bytes})
    kept = texts_of(tmp_path / "out", "train", trained()) + texts_of(tmp_path / "out", "held-out", trained())
    assert sorted(kept) == sorted(corpus[1][:limit])
    after = {2: 0, 17: 5, 160: 25, 301: 40}[limit]  # rejections that stand before the last document
    assert len(rejected(tmp_path / "out")) == after


def test_a_damaged_file_costs_its_rest_alone(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    import gzip

    content = (corpus[0] / "a.jsonl").read_bytes()
    packed = gzip.compress(content)
    (tmp_path / "a.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    (tmp_path / "b.jsonl").write_bytes((corpus[0] / "b.jsonl").read_bytes())
    index = run([str(tmp_path / "a.jsonl.gz"), str(tmp_path / "b.jsonl")], tmp_path / "out").index
    assert index.rejected["damaged (it ends early)"] == 1
    (entry,) = [entry for entry in rejected(tmp_path / "out") if entry["reason"].startswith("damaged")]
    assert entry["file"].endswith("a.jsonl.gz")
    documents = index.total("train", "documents") + index.total("held-out", "documents")
    assert 160 < documents < 300


# Refusals


def test_a_wrong_field_is_refused_with_the_names_that_are_there(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"body": "a", "title": "b"}\n{"url": "c"}\n')
    with pytest.raises(
        ValueError,
        match=r"none of 2 records has the text field 'text'; they have body, title, url: .*--text-field",
    ):
        run(tmp_path / "x.jsonl", tmp_path / "out")
    pq.write_table(pa.table({"content": ["a", "b"]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match="they have content"):
        run(tmp_path / "x.parquet", tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()
    assert run(tmp_path / "x.parquet", tmp_path / "out", text_field="content").index.rejected == {}


def test_a_wrong_field_is_seen_before_all_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_RECORDS_WITHOUT_FIELD", 100)
    (tmp_path / "x.jsonl").write_text('{"body": "a"}\n' * 5000)
    with pytest.raises(ValueError, match="none of 1.. records has the text field"):
        run(tmp_path / "x.jsonl", tmp_path / "out", call={"chunk_bytes": 100})


def test_too_little_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("one document")
    with pytest.raises(
        ShardError, match=r"x.txt: 1 document left \(nothing rejected\); .*--document-separator"
    ):
        run(tmp_path / "x.txt", tmp_path / "out")
    (tmp_path / "x.jsonl").write_text('nonsense\n{"text": ""}\n')
    with pytest.raises(ShardError, match=r"0 documents left \(1 unreadable line, 1 empty\)"):
        run(tmp_path / "x.jsonl", tmp_path / "out")
    (tmp_path / "x.txt").write_bytes("café".encode("latin-1"))
    with pytest.raises(ShardError, match=r"\(1 not UTF-8\); .* iconv -f latin1 -t utf-8"):
        run(tmp_path / "x.txt", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl", "x.txt"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"held_out": 0}, "held_out = 0 must lie"),
        ({"held_out": 1}, "held_out = 1 must lie"),
        ({"separator": "x", "blank_lines": True}, "choose one"),
        ({"limit": 1}, "limit = 1 must be at least 2"),
        ({"min_characters": 5, "max_characters": 4}, "at least 5 and at most 4"),
        ({"max_characters": 0}, "at most 0"),
        ({"shard_tokens": 0}, "shard_tokens = 0"),
        ({"near_duplicates": 1.0}, "threshold = 1.0"),
        ({"call": {"workers": 0}}, "workers = 0"),
        ({"call": {"checkpoint_seconds": -1.0}}, "checkpoint_seconds = -1.0"),
        ({"call": {"checkpoint_seconds": math.nan}}, "checkpoint_seconds = nan"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(
    corpus: tuple[Path, list[str]], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        run(corpus[0], tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


def test_what_is_there_is_not_overwritten_unasked(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    for overwrite in (False, True):  # what is no folder of shards is never replaced
        with pytest.raises(FileExistsError, match="out: "):
            run(corpus[0], out, call={"overwrite": overwrite})
    run(corpus[0], tmp_path / "shards")
    before = contents(tmp_path / "shards")
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(corpus[0], tmp_path / "shards", held_out=0.1)
    assert contents(tmp_path / "shards") == before
    run(corpus[0], tmp_path / "shards", held_out=0.1, call={"overwrite": True})
    assert contents(tmp_path / "shards") != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "shards"]


def test_the_same_command_again_finds_it_done(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(corpus[0], tmp_path / "out")
    assert not first.resumed
    monkeypatch.setattr(prepare_module, "Workers", None)
    again = run(corpus[0], tmp_path / "out")
    assert (again.index, again.progress) == (first.index, None)
    for damage in (lambda file: file.write_bytes(file.read_bytes()[:-2]), Path.unlink):
        damage(tmp_path / "out" / "held-out-00000.bin")
        with pytest.raises(FileExistsError, match="--overwrite"):
            run(corpus[0], tmp_path / "out")


def test_standard_input_is_never_taken_for_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot be told whether it would give the same again."""
    for word in ("first", "other"):
        content = "".join(json.dumps({"text": f"{word} {i}"}) + "\n" for i in range(20)).encode()
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
        if word == "first":
            run(["-"], tmp_path / "out", format="jsonl")
        else:
            with pytest.raises(FileExistsError, match="--overwrite"):
                run(["-"], tmp_path / "out", format="jsonl")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"separator": "X"}, "--document-separator .* plain text, .* none of it"),
        ({"blank_lines": True}, "--split-on-blank-lines .* plain text"),
        ({"hub_config": "en"}, "--hub-config .* the Hub"),
        ({"hub_split": "test"}, "--hub-split .* the Hub"),
    ],
    ids=str,
)
def test_settings_that_no_input_takes(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_corpus(tmp_path / "in", 20)
    with pytest.raises(ValueError, match=words):
        run(tmp_path / "in" / "a.jsonl", tmp_path / "out", **changes)
    with pytest.raises(ValueError, match=words):
        sample_texts([str(tmp_path / "in" / "a.jsonl")], PrepareSettings(**changes), 1000)
    with pytest.raises(ValueError, match="--text-field names .* plain text"):
        run(tmp_path / "in" / "c.txt", tmp_path / "out", text_field="body")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_input_that_changed_since_is_no_longer_done(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", 20)
    run(tmp_path / "in", tmp_path / "out")
    later = time.time() + 10
    os.utime(tmp_path / "in" / "a.jsonl", (later, later))
    with pytest.raises(FileExistsError, match="--overwrite"):
        run(tmp_path / "in", tmp_path / "out")


# Interruptions


class CrashError(BaseException):
    """Not an Exception, so nothing handles it by mistake."""


class Tripwire:
    """Makes the nth call of an fsync or a rename the last one; what was not synced may be there all the same."""

    def __init__(self, patch: pytest.MonkeyPatch, calls: int) -> None:
        self.left = calls
        for name in ("replace", "rename"):
            patch.setattr(os, name, self._guarded(getattr(os, name)))
        patch.setattr(os, "fsync", self._guarded(lambda descriptor: None))  # real ones take their time

    def _guarded(self, real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.left -= 1
            if self.left <= 0:
                raise CrashError
            return real(*arguments)

        return call


@settings(deadline=None, max_examples=20)
@given(data=st.data())
def test_a_crash_at_any_write_costs_nothing(
    corpus: tuple[Path, list[str]],
    expected: dict[str, bytes],
    tmp_path_factory: pytest.TempPathFactory,
    data: st.DataObject,
) -> None:
    out = tmp_path_factory.mktemp("crash") / "out"
    for crash in [*data.draw(st.lists(st.integers(1, 120), min_size=1, max_size=4)), 10**9]:
        call = {"chunk_bytes": data.draw(st.sampled_from([1000, 4000])), "checkpoint_seconds": 0}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(prepare_module, "Workers", InlineWorkers)
            Tripwire(patch, crash)
            try:
                run(corpus[0], out, shard_tokens=2000, held_out=0.1, call=call)
            except CrashError:
                continue
    assert contents(out) == expected
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_balanced_corpus_survives_crashes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last step where no document was held out: the shards are written a second time."""
    write_corpus(tmp_path / "in", 20)
    run(tmp_path / "in", tmp_path / "expected", held_out=1e-9)
    assert read_index(tmp_path / "expected").total("held-out", "documents") == 1
    for crash in range(1, 60):
        with monkeypatch.context() as patch:
            Tripwire(patch, crash)
            try:
                run(tmp_path / "in", tmp_path / "out", held_out=1e-9)
            except CrashError:
                continue
        break
    assert crash > 5
    assert contents(tmp_path / "out") == contents(tmp_path / "expected")


def test_stopped_and_gone_on_with(
    corpus: tuple[Path, list[str]], expected: dict[str, bytes], tmp_path: Path
) -> None:
    stops, done = 0, None
    while done is None:
        stop, first = threading.Event(), list[int]()

        def report(progress: Any, stop: threading.Event = stop, first: list[int] = first) -> None:
            first.append(progress.documents)
            if progress.documents > first[0]:
                stop.set()

        call = {"stop": stop, "report": report, "chunk_bytes": 4000}
        try:
            done = run(corpus[0], tmp_path / "out", shard_tokens=2000, held_out=0.1, call=call)
        except Stopped:
            stops += 1
    assert stops > 3
    assert done.resumed
    assert contents(tmp_path / "out") == expected


def test_near_duplicates_are_remembered_over_a_crash(tmp_path: Path) -> None:
    generator = random.Random(2)
    texts = [" ".join(f"w{generator.randrange(9973)}" for _ in range(200)) for _ in range(30)]
    lines = [json.dumps({"text": text}) for text in texts + [text + " end" for text in texts] + texts]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    run(tmp_path / "x.jsonl", tmp_path / "whole", near_duplicates=0.8)
    assert read_index(tmp_path / "whole").rejected == {"near duplicate": 30, "duplicate": 30}
    stop = threading.Event()

    def report(progress: Any) -> None:
        if progress.documents >= 20:
            stop.set()

    with pytest.raises(Stopped):
        run(
            tmp_path / "x.jsonl",
            tmp_path / "out",
            near_duplicates=0.8,
            call={"stop": stop, "report": report, "chunk_bytes": 2000},
        )
    run(tmp_path / "x.jsonl", tmp_path / "out", near_duplicates=0.8)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def unfinished(corpus: Path, out: Path, **settings: Any) -> None:
    stop = threading.Event()

    def report(progress: Any) -> None:
        if progress.documents:
            stop.set()

    with pytest.raises(Stopped):
        run(corpus, out, call={"stop": stop, "report": report, "chunk_bytes": 1000}, **settings)
    assert (out.parent / "out.partial").is_dir()


def test_what_has_not_begun_leaves_nothing(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    stop = threading.Event()
    stop.set()
    with pytest.raises(Stopped):
        run(corpus[0], tmp_path / "out", call={"stop": stop})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"text_field": "body"}, "other text field"),
        ({"licence": "x", "held_out": 0.2}, "other held out, licence"),
        ({"tokenizer": small()}, "other tokenizer"),
        ({"near_duplicates": 0.8}, "other near duplicates"),
    ],
    ids=["field", "two", "tokenizer", "near"],
)
def test_another_command_does_not_go_on(
    corpus: tuple[Path, list[str]], tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    unfinished(corpus[0], tmp_path / "out")
    before = contents(tmp_path / "out.partial")
    with pytest.raises(ValueError, match=f"out.partial: an unfinished preparation with {words}; .*--fresh"):
        run(corpus[0], tmp_path / "out", **changes)
    assert contents(tmp_path / "out.partial") == before
    run(corpus[0], tmp_path / "fresh")
    run(corpus[0], tmp_path / "out", **(changes if "text_field" not in changes else {}), call={"fresh": True})
    verify(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_inputs_that_changed_do_not_go_on(tmp_path: Path) -> None:
    write_corpus(tmp_path / "in", 60)
    unfinished(tmp_path / "in", tmp_path / "out")
    later = time.time() + 10
    os.utime(tmp_path / "in" / "a.jsonl", (later, later))
    with pytest.raises(ValueError, match="other modification times;"):
        run(tmp_path / "in", tmp_path / "out")


def test_a_folder_that_is_not_ours_is_left_alone(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "thesis.tex").write_text("x")
    for fresh in (False, True):
        with pytest.raises(ValueError, match=r"holds thesis.tex, which is no unfinished preparation"):
            run(corpus[0], tmp_path / "out", call={"fresh": fresh})
    assert (tmp_path / "out.partial" / "thesis.tex").read_text() == "x"


def test_two_at_once(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    def report(progress: Any) -> None:
        with pytest.raises(ValueError, match="another process is preparing into it"):
            run(corpus[0], tmp_path / "out")

    run(corpus[0], tmp_path / "out", call={"report": report})


@pytest.mark.parametrize(
    "file", ["digests.bin", "shards/rejected.jsonl", "shards/train-00000.bin", "journal.json", "command.json"]
)
def test_a_damaged_partial_folder_is_refused(
    corpus: tuple[Path, list[str]], tmp_path: Path, file: str
) -> None:
    stop = threading.Event()

    def report(progress: Any) -> None:
        if progress.rejected > 3:
            stop.set()

    with pytest.raises(Stopped):
        run(corpus[0], tmp_path / "out", call={"stop": stop, "report": report, "chunk_bytes": 1000})
    path = tmp_path / "out.partial" / file
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ValueError, match=rf"{path.name}: .*(--fresh|again)"):
        run(corpus[0], tmp_path / "out")
    run(corpus[0], tmp_path / "out", call={"fresh": True})
    verify(tmp_path / "out")


# A full disk


@pytest.mark.parametrize("where", ["shard", "log", "journal"])
def test_a_full_disk_goes_on_when_there_is_room(
    corpus: tuple[Path, list[str]],
    expected: dict[str, bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls = 0

    def failing(real: Any) -> Any:
        def call(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > 12:
                raise full
            return real(*arguments)

        return call

    target: tuple[Any, str] = {
        "shard": (shard_writer.os, "fsync"),
        "log": (journal.Log, "sync"),
        "journal": (journal.Workplace, "save"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target, failing(getattr(*target)))
        with pytest.raises(OSError, match=r"No space left on device; what is done is kept: make room"):
            call = {"chunk_bytes": 1000, "checkpoint_seconds": 0}
            run(corpus[0], tmp_path / "out", shard_tokens=2000, held_out=0.1, call=call)
    assert not (tmp_path / "out").exists()
    done = run(corpus[0], tmp_path / "out", shard_tokens=2000, held_out=0.1)
    assert done.resumed
    assert contents(tmp_path / "out") == expected


# Real processes

SCRIPT = """
import resource, sys
from pathlib import Path
from mobilellm.data.prepare import prepare
from mobilellm.data.prepare_settings import PrepareSettings
from mobilellm.tokenizer import Tokenizer
source, out, tokenizer, size = sys.argv[1:]
if int(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
settings = PrepareSettings(shard_tokens=2000, held_out=0.1)
try:
    prepare([source], Tokenizer.load(tokenizer), Path(out), settings, 2, chunk_bytes=1000, checkpoint_seconds=0)
except OSError as error:
    print(error)
    sys.exit(2)
"""


def command(corpus: Path, out: Path, tokenizer: Path, size: int = 0) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(corpus), str(out), str(tokenizer), str(size)]


def test_killed_at_random_moments(
    corpus: tuple[Path, list[str]], expected: dict[str, bytes], tmp_path: Path, processes: None
) -> None:
    trained().save(tmp_path / "tokenizer")
    generator, kills = random.Random(0), 0
    journal_file = tmp_path / "out.partial" / "journal.json"
    for attempt in range(60):
        with subprocess.Popen(command(corpus[0], tmp_path / "out", tmp_path / "tokenizer")) as process:
            before = journal_file.read_bytes() if journal_file.exists() else b""
            while (
                attempt < 5
                and process.poll() is None
                and (not journal_file.exists() or journal_file.read_bytes() == before)
            ):
                time.sleep(0.002)
            if attempt < 5:  # it has begun to write, and an idle machine ends soon after
                time.sleep(generator.uniform(0, 0.02 if kills < 3 else 0.15))
                process.kill()
                kills += process.wait() == -signal.SIGKILL
            elif process.wait() == 0:
                break
    assert kills >= 3
    assert contents(tmp_path / "out") == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "tokenizer"]


def test_a_disk_that_takes_no_more(
    corpus: tuple[Path, list[str]], expected: dict[str, bytes], tmp_path: Path, processes: None
) -> None:
    """The system itself refuses bytes: files may not grow over 1,500 bytes, then over any size."""
    trained().save(tmp_path / "tokenizer")
    done = subprocess.run(
        command(corpus[0], tmp_path / "out", tmp_path / "tokenizer", 1500),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "File too large; what is done is kept: make room and give the same command to go on" in done.stdout
    assert done.stdout.count("\n") == 1
    assert done.stderr == ""
    subprocess.run(command(corpus[0], tmp_path / "out", tmp_path / "tokenizer"), timeout=300, check=True)
    assert contents(tmp_path / "out") == expected


def test_a_worker_that_dies(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: None
) -> None:
    from mobilellm.data import workers

    def kill_one(self: Any, chunks: Any) -> Any:
        self._all[0]._process.kill()
        return workers.Workers._threads_submit(self, chunks)

    monkeypatch.setattr(workers.Workers, "_threads_submit", workers.Workers.submit, raising=False)
    monkeypatch.setattr(workers.Workers, "submit", kill_one)
    with pytest.raises(
        ChildProcessError, match=r"a worker process died \(signal 9; .*the same command to go on"
    ):
        run(corpus[0], tmp_path / "out")
    monkeypatch.undo()
    run(corpus[0], tmp_path / "out")
    verify(tmp_path / "out")


def test_workers_end_with_their_parent(
    corpus: tuple[Path, list[str]], tmp_path: Path, processes: None
) -> None:
    script = """
import sys, time
from mobilellm.data.screening import ScreenSettings
from mobilellm.data.workers import Workers
from mobilellm.tokenizer import Tokenizer
workers = Workers(2, ScreenSettings(), Tokenizer.load(sys.argv[1]))
workers.submit([]).result()
print(*(worker._process.pid for worker in workers._all), flush=True)
time.sleep(60)
"""
    trained().save(tmp_path / "tokenizer")
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "tokenizer")], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) == 2
        parent.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and any(_runs(child) for child in children):
        time.sleep(0.02)
    assert not any(_runs(child) for child in children)


def _runs(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
