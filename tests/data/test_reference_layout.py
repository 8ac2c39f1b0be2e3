"""The reference's layout: what its trainer would read is our stream, and what it and others write comes in."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.data import reference_import, reference_layout
from mobilellm.data.documents import Document
from mobilellm.data.reference_import import import_reference
from mobilellm.data.reference_layout import export_reference
from mobilellm.data.shard_index import ShardError, make_index, read_index, write_index
from mobilellm.data.shard_writer import ShardWriter
from mobilellm.data.shards import read_split, verify, write_shards
from mobilellm.tokenizer import BOS_ID, EOS_ID, Tokenizer
from tokenizer_oracles import TEXTS, trained

STORIES = [Document(f"story {i}", f"Story {i}.\nIt has {i * i} words,\n\nor é {i}.") for i in range(120)]


def stored(directory: Path, documents: list[list[int]]) -> Path:
    """Documents of ids as the train split of a folder of shards."""
    directory.mkdir(parents=True)
    with ShardWriter(directory, trained().vocab_size) as writer:
        for ids in documents:
            writer.add("train", ids, 1, 1)
        shards = writer.finish()
    index = make_index(trained().vocab_size, trained().fingerprint, "here", "ours", {}, shards)
    write_index(directory, index)
    return directory


def stream_of(directory: Path, split: str = "train") -> list[int]:
    return np.asarray(read_split(directory, split)).tolist()


def node(directory: Path, number: int | str, lines: list[Any], name: str = "data.jsonl") -> None:
    """A node folder; lines that are lists are token ids, the others are written as they are."""
    (directory / str(number)).mkdir(parents=True, exist_ok=True)
    with (directory / str(number) / name).open("wb") as file:
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps({"token_ids": line}).encode() + b"\n")


def what_gpus_read(directory: Path, ranks: int) -> list[list[list[int]]]:
    """Lines of each global rank in its first pass, as the reference takes them: node rank // 8 + 1, line mod 8."""
    read = []
    for rank in range(ranks):
        [name] = [name for name in os.listdir(directory / str(rank // 8 + 1)) if name.endswith(".jsonl")]
        lines = (directory / str(rank // 8 + 1) / name).read_text().splitlines()
        read.append([json.loads(line)["token_ids"] for line in lines[rank % 8 :: 8]])
    return read


def as_amber_does(documents: list[list[int]], length: int, files: int) -> list[list[list[int]]]:
    """Sequences of each file: documents without BOS closed by EOS, cut, the tail dropped, dealt out in turn."""
    stream = [token for ids in documents for token in [*ids, EOS_ID]]
    sequences = [stream[i : i + length] for i in range(0, len(stream) - length + 1, length)]
    return [sequences[i::files] for i in range(files)]


@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(TEXTS.filter(str.strip), min_size=1, max_size=30),
    nodes=st.integers(1, 6),
    sequence_length=st.integers(1, 40),
)
def test_export_then_import_gives_the_same_stream(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], nodes: int, sequence_length: int
) -> None:
    folder = tmp_path_factory.mktemp("round")
    documents = trained().encode_batch(texts, eos=True)
    documents += [[BOS_ID, 300, EOS_ID]] * (8 * nodes * (sequence_length + 1) // 3)  # enough for the nodes
    tokens = [token for ids in documents for token in ids]
    done = export_reference(stored(folder / "shards", documents), folder / "ref", nodes, sequence_length)
    assert done.tokens == len(tokens) == done.sequences * (sequence_length + 1) + done.remainder
    read = what_gpus_read(folder / "ref", 8 * nodes)
    assert all(read)  # every GPU has a line, or it would look for one for ever
    assert {len(line) for lines in read for line in lines} == {sequence_length + 1}  # can be stacked
    counts = [sum(map(len, read[8 * n : 8 * n + 8])) for n in range(nodes)]
    assert max(counts) - min(counts) <= 1
    index = import_reference(folder / "ref", folder / "back", trained())
    assert stream_of(folder / "back") == tokens
    assert index.total("train", "documents") == len(documents)
    assert index.total("train", "bytes") == sum(len(trained().decode(ids).encode()) for ids in documents)
    assert index.rejected == {}
    verify(folder / "back")


def test_the_counts_of_the_text_come_back(tmp_path: Path) -> None:
    before = write_shards(tmp_path / "shards", STORIES, trained(), "stories", "ours", held_out=0.1)
    export_reference(tmp_path / "shards", tmp_path / "ref", 3, 31)
    after = import_reference(tmp_path / "ref", tmp_path / "back", trained())
    for field in ("tokens", "documents", "bytes", "words"):
        assert after.total("train", field) == before.total("train", field)
    assert (after.source, after.licence, after.preparation["documents_without_bos"]) == ("stories", "ours", 0)
    assert after == read_index(tmp_path / "back")
    assert Tokenizer.load(tmp_path / "back" / "tokenizer").fingerprint == after.tokenizer
    assert {shard.sha256 for shard in after.shards} <= {shard.sha256 for shard in before.shards}


def test_held_out_is_decided_by_the_same_hash(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", STORIES, trained(), "stories", "ours", held_out=0.3)
    for split in ("train", "held-out"):
        export_reference(tmp_path / "shards", tmp_path / split, 1, 15, split)
        index = import_reference(tmp_path / split, tmp_path / f"{split}-back", trained(), held_out=0.3)
        assert {shard.split for shard in index.shards} == {split}
        assert stream_of(tmp_path / f"{split}-back", split) == stream_of(tmp_path / "shards", split)


def test_every_token_is_trained_on_by_one_gpu(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", STORIES, trained(), "stories", "ours")
    export_reference(tmp_path / "shards", tmp_path / "ref", 2, 63)
    lines = [line for lines in what_gpus_read(tmp_path / "ref", 16) for line in lines]
    stream = stream_of(tmp_path / "shards")
    expected = [stream[i : i + 64] for i in range(0, len(stream) - 63, 64)]
    assert sorted(lines) == sorted(expected)
    assert sorted(path.name for path in (tmp_path / "ref").iterdir()) == [
        "1",
        "2",
        "mobilellm.json",
        "remainder.jsonl",
    ]
    rest = json.loads((tmp_path / "ref" / "remainder.jsonl").read_text())["token_ids"]
    assert rest == stream[len(expected) * 64 :] != []


@settings(deadline=None, max_examples=20)
@given(
    documents=st.lists(st.lists(st.integers(262, 599), min_size=1, max_size=40), min_size=20, max_size=40),
    length=st.integers(1, 30),
    files=st.integers(1, 12),
    add_bos=st.booleans(),
)
def test_what_amber_data_prep_writes_comes_in(
    tmp_path_factory: pytest.TempPathFactory,
    documents: list[list[int]],
    length: int,
    files: int,
    add_bos: bool,
) -> None:
    folder = tmp_path_factory.mktemp("amber")
    dealt = [sequences for sequences in as_amber_does(documents, length, files) if sequences]
    (folder / "flat").mkdir()
    for number, sequences in enumerate(dealt):  # train_10 comes after train_9; "source" is of no account
        lines = [json.dumps({"token_ids": ids, "source": "c4"}) + "\n" for ids in sequences]
        (folder / "flat" / f"train_{number}.jsonl").write_text("".join(lines))
        node(folder / "nodes", number + 1, sequences)
    whole = [token for ids in documents for token in [*ids, EOS_ID]]
    whole = whole[: len(whole) // length * length]
    expected, start = [], True
    for token in whole:
        expected += [BOS_ID, token] if start and add_bos else [token]
        start = token == EOS_ID
    for layout in ("flat", "nodes"):
        index = import_reference(folder / layout, folder / f"{layout}-shards", trained(), add_bos=add_bos)
        assert stream_of(folder / f"{layout}-shards") == expected
        count = whole.count(EOS_ID) + (whole[-1] != EOS_ID)
        assert index.total("train", "documents") == count
        assert index.preparation["documents_without_bos"] == (0 if add_bos else count)


def test_blocks_are_read_node_by_node(tmp_path: Path) -> None:
    for number in (1, 2, 10, 3, 4, 5, 6, 7, 8, 9):
        node(tmp_path / "ref", number, [[300 + number, 400], [300 + number, 401]])
    node(tmp_path / "ref", 2, [[350, 450]], name="more_2.jsonl")  # the reference would read one of the two
    import_reference(tmp_path / "ref", tmp_path / "blocks", trained(), order="node-by-node")
    dealt = [[300 + n, 400 + i] for n in range(1, 11) for i in range(2)]
    dealt.insert(4, [350, 450])
    assert stream_of(tmp_path / "blocks") == [token for line in dealt for token in line]
    import_reference(tmp_path / "ref", tmp_path / "dealt", trained())
    dealt = [[300 + n, 400 + i] for i in range(2) for n in range(1, 11)] + [[350, 450]]
    assert stream_of(tmp_path / "dealt") == [token for line in dealt for token in line]


BAD_LINES: dict[bytes, str] = {
    b"\n": "empty",
    b'{"token_ids": []}\n': "empty",
    b"not json\n": "not JSON",
    b'{"token_ids": [300, 40': "not JSON",  # cut short; another line follows it in the test
    b"[" * 100_000 + b"\n": "not JSON",
    b'{"text": "x"}\n': "no token_ids",
    b"[300, 301]\n": "no token_ids",
    b'{"token_ids": null}\n': "no token_ids",
    b'{"token_ids": "300"}\n': "not whole numbers",
    b'{"token_ids": [300, 301.0]}\n': "not whole numbers",
    b'{"token_ids": [300, NaN]}\n': "not whole numbers",
    b'{"token_ids": [300, true]}\n': "not whole numbers",
    b'{"token_ids": [[300]]}\n': "not whole numbers",
    b'{"token_ids": [300, 700]}\n': "outside the vocabulary",
    b'{"token_ids": [300, -1]}\n': "outside the vocabulary",
    b'{"token_ids": [300, 1e2]}\n': "not whole numbers",
    b'{"token_ids": [99999999999999999999999999]}\n': "outside the vocabulary",
    b'{"token_ids": [300], "source": "\xff"}\n': "not UTF-8",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: line[:30].decode("ascii", "replace").strip())
def test_a_bad_line_is_counted_and_listed(tmp_path: Path, bad: bytes) -> None:
    bad_line = bad if bad.endswith(b"\n") else bad + b"\n"
    node(tmp_path / "ref", 1, [[BOS_ID, 300, 301], [302, EOS_ID], bad_line, [310, EOS_ID]])
    node(tmp_path / "ref", 2, [[303, 304], [BOS_ID, 305, 306], [307, 308]])
    index = import_reference(tmp_path / "ref", tmp_path / "shards", trained())
    reason = BAD_LINES[bad]
    assert index.rejected == {reason: 1}
    listed = [json.loads(line) for line in (tmp_path / "shards" / "rejected.jsonl").read_text().splitlines()]
    text = bad.strip()[:80].decode(errors="replace")
    assert listed == [{"file": os.path.join("1", "data.jsonl"), "line": 3, "reason": reason, "text": text}]
    assert stream_of(tmp_path / "shards") == [
        BOS_ID, 300, 301, 303, 304, 302, EOS_ID, BOS_ID, 305, 306, 307, 308, 310, EOS_ID,
    ]  # fmt: skip
    assert (
        index.total("train", "documents") == 3
    )  # what stood on both sides of the bad line is not one document


def test_a_byte_order_mark_and_a_missing_line_end_are_no_fault(tmp_path: Path) -> None:
    node(tmp_path / "ref", 1, [b'\xef\xbb\xbf{"token_ids": [300, 301]}\r\n', b'{"token_ids": [302]}'])
    import_reference(tmp_path / "ref", tmp_path / "shards", trained())
    assert stream_of(tmp_path / "shards") == [300, 301, 302]


def test_an_endless_line_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_layout, "_LONGEST_LINE", 100)
    node(tmp_path / "ref", 1, [[300], list(range(300, 500)), [301], b'{"token_ids": [' + b" " * 1000])
    index = import_reference(tmp_path / "ref", tmp_path / "shards", trained())
    assert stream_of(tmp_path / "shards") == [300, 301]
    assert index.rejected == {"too long": 2}


def test_a_document_longer_than_memory_is_stored_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference_import, "LONGEST_DOCUMENT", 10)
    sequences = [[300 + i, 301 + i, 302 + i] for i in range(20)]
    sequences[-1][-1] = EOS_ID
    node(tmp_path / "ref", 1, [*sequences, [300, EOS_ID]])
    index = import_reference(tmp_path / "ref", tmp_path / "shards", trained(), add_bos=True)
    long = [token for ids in sequences for token in ids]
    assert stream_of(tmp_path / "shards") == [BOS_ID, *long, BOS_ID, 300, EOS_ID]  # one BOS, in front
    assert index.total("train", "documents") == 6


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path) -> None:
    def refused(match: str, kind: type[Exception] = ValueError, **settings: Any) -> None:
        with pytest.raises(kind, match=match) as caught:
            import_reference(tmp_path / "ref", tmp_path / "shards", trained(), **settings)
        assert "\n" not in str(caught.value)
        assert str(tmp_path) in str(caught.value) or "held_out" in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) in ([], ["ref"])

    refused("no such folder", FileNotFoundError)
    (tmp_path / "ref").mkdir()
    refused("neither node folders")
    node(tmp_path / "ref", 1, [[300]])
    refused("held_out", held_out=1.0)
    node(tmp_path / "ref", 3, [[300]])
    refused("1, 3, which are not")
    (tmp_path / "ref" / "2").mkdir()
    refused("2: holds no .jsonl file")
    for number in (1, 2, 3):
        node(tmp_path / "ref", number, [b"\n", b"x\n"])
    refused("no line of it can be used .*3 empty, 3 not JSON", ShardError)
    for number in (1, 2, 3):
        node(tmp_path / "ref", number, [[EOS_ID], [BOS_ID, EOS_ID]])
    refused("spell no word", ShardError)


def test_a_changed_export_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", STORIES, trained(), "stories", "ours")
    export_reference(tmp_path / "shards", tmp_path / "ref", 2, 31)
    file = tmp_path / "ref" / "2" / "train.jsonl"
    whole = file.read_bytes()
    file.write_bytes(b"".join(whole.splitlines(keepends=True)[:-1]))
    with pytest.raises(ShardError, match="lines and its mobilellm.json says"):
        import_reference(tmp_path / "ref", tmp_path / "back", trained())
    file.write_bytes(whole)
    (tmp_path / "ref" / "remainder.jsonl").unlink()
    with pytest.raises(ShardError, match=r"remainder\.jsonl is missing"):
        import_reference(tmp_path / "ref", tmp_path / "back", trained())
    manifest = tmp_path / "ref" / "mobilellm.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"tokenizer": "f" * 64}))
    with pytest.raises(ShardError, match="made with tokenizer ffffffffffff"):
        import_reference(tmp_path / "ref", tmp_path / "back", trained())
    for broken in ("{", "[]", json.dumps(values | {"format": "x"}), json.dumps(values | {"more": 1})):
        manifest.write_text(broken)
        with pytest.raises(ShardError, match="not what export writes"):
            import_reference(tmp_path / "ref", tmp_path / "back", trained())
    assert not (tmp_path / "back").exists()


def test_an_export_the_reference_could_not_read_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards", STORIES, trained(), "stories", "ours")
    tokens = len(read_split(tmp_path / "shards", "train"))
    nodes = tokens // 32 // 8
    export_reference(tmp_path / "shards", tmp_path / "ref", nodes, 31)
    assert all(what_gpus_read(tmp_path / "ref", 8 * nodes))
    with pytest.raises(ValueError, match=f"{nodes + 1} nodes of 8 GPUs need at least {8 * nodes + 8}"):
        export_reference(tmp_path / "shards", tmp_path / "more", nodes + 1, 31)
    for wrong in ({"nodes": 0}, {"nodes": 1, "sequence_length": 0}):
        with pytest.raises(ValueError, match="must be at least 1"):
            export_reference(tmp_path / "shards", tmp_path / "more", **wrong)
    with pytest.raises(FileExistsError):
        export_reference(tmp_path / "shards", tmp_path / "ref", 1, 31)
    export_reference(tmp_path / "shards", tmp_path / "ref", 1, 31, overwrite=True)
    assert not (tmp_path / "ref" / "2").exists()
    assert not (tmp_path / "more").exists()


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Ten times the data, the same peak: what Python and numpy allocate beyond the tokenizer."""
    import tracemalloc

    peaks = []
    for size in (10, 100):
        folder = tmp_path / str(size)
        line = [300 + i % 399 for i in range(499)]
        node(folder, 1, [[*line, EOS_ID]] * size)
        node(folder, 2, [[*line, EOS_ID]] * size)
        import_reference(folder, tmp_path / f"{size}-shards", trained())
        tracemalloc.start()
        import_reference(folder, tmp_path / f"{size}-shards", trained(), overwrite=True)
        export_reference(tmp_path / f"{size}-shards", tmp_path / f"{size}-ref", 1, 99, overwrite=True)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] + 2**20, peaks


def test_files_are_taken_by_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "ref").mkdir()
    for number in (10, 2, 0, 1, 11, 9):
        (tmp_path / "ref" / f"train_{number}.jsonl").write_text(json.dumps({"token_ids": [300 + number]}))
    import_reference(tmp_path / "ref", tmp_path / "shards", trained())
    assert stream_of(tmp_path / "shards") == [300, 301, 302, 309, 310, 311]
