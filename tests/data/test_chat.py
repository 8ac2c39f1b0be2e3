"""Files of conversations: every kind of file, every skip counted with its place, real data whole."""

from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
from chat_data import conversations, records, tokenizer, written

from mobilellm.chat_template import DEFAULT, ChatTemplate
from mobilellm.data.chat import Place, Skip, held_out_ones, read_chat, read_talks
from mobilellm.tokenizer import EOS_ID, Tokenizer

TEMPLATE = ChatTemplate(DEFAULT, tokenizer())
ROWS = records(7)


def test_every_kind_of_file_gives_the_same(tmp_path: Path) -> None:
    lines = written(tmp_path / "a.jsonl", ROWS)
    content = lines.read_bytes()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "a.ndjson.xz").write_bytes(lzma.compress(content))
    (tmp_path / "lines.json").write_bytes(b"\xef\xbb\xbf" + content)
    (tmp_path / "list.json").write_text(json.dumps(ROWS, indent=2))
    files = sorted(tmp_path.iterdir())
    try:
        import pyarrow
        import pyarrow.parquet
        import zstandard
    except ImportError:
        pass
    else:
        (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress(content))
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
        files = sorted(tmp_path.iterdir())
    expected = read_chat([lines], TEMPLATE, 1000).conversations.fingerprint
    for file in files:
        read = read_chat([file], TEMPLATE, 1000)
        assert read.conversations.fingerprint == expected, file
        assert not read.skips
    both = read_chat(files[:2], TEMPLATE, 1000).conversations
    assert len(both) == 2 * len(ROWS)
    (tmp_path / "notes.txt").write_text("no conversations")
    whole_folder = read_chat([tmp_path], TEMPLATE, 1000).conversations
    assert whole_folder.fingerprint == read_chat(files, TEMPLATE, 1000).conversations.fingerprint


def test_a_folder_without_conversations(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no conversations")
    with pytest.raises(FileNotFoundError, match="holds no file of conversations"):
        read_chat([tmp_path], TEMPLATE, 1000)


def test_what_is_encoded(tmp_path: Path) -> None:
    found = conversations(tmp_path, 5)
    for index, row in enumerate(records(5)):
        part = slice(found.starts[index], found.ends[index])
        tokens, trained = TEMPLATE.conversation(row["messages"])
        assert found.tokens[part].tolist() == tokens
        assert found.trained[part].tolist() == trained


def test_every_skip_is_counted_with_its_place(tmp_path: Path) -> None:
    long = {"prompt": "the river " * 200, "completion": "the sea"}
    file = tmp_path / "mixed.jsonl"
    lines = [
        json.dumps(ROWS[0]), "", "{broken", "[1]", json.dumps({"text": "x"}),
        json.dumps({"messages": [{"role": "robot", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user", "content": "x"}]}),
        json.dumps({"prompt": "why", "completion": ""}), json.dumps(long),
        json.dumps({"prompt": "\ud800", "completion": "no text"}),
    ]  # fmt: skip
    file.write_bytes("\n".join(lines).encode() + b'\n"\xff"\n')
    read = read_chat([file], TEMPLATE, 100)
    assert len(read.conversations) == 1
    assert read.counts == {
        "unreadable line": 1, "not an object": 1, "unknown shape": 1, "unknown role": 1, "no assistant turn": 1,
        "empty answer": 1, "too long": 1, "refused by the template": 1, "not UTF-8": 1,
    }  # fmt: skip
    assert [skip.place.number for skip in read.skips] == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert read.skips[0] == Skip(Place(str(file), "line", 3), "unreadable line", "{broken")
    assert not read.truncated


def test_a_row_that_is_no_utf8_costs_itself_alone(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    columns = [pa.array(texts, pa.binary()) for texts in ([b"why", b"caf\xe9", b"how"], [b"so"] * 3)]
    unchecked = [pa.Array.from_buffers(pa.string(), 3, column.buffers()) for column in columns]
    table = pa.Table.from_arrays(unchecked, ["prompt", "completion"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    read = read_chat([tmp_path / "a.parquet"], TEMPLATE, 100)
    assert len(read.conversations) == 2
    assert read.skips == [Skip(Place(str(tmp_path / "a.parquet"), "row", 1), "not UTF-8", "")]


def test_too_long_ones_can_be_cut(tmp_path: Path) -> None:
    early = {"messages": ROWS[0]["messages"] + [{"role": "user", "content": "the sea " * 300}]}
    late = {"prompt": "the sea " * 300, "completion": "the river"}
    file = written(tmp_path / "long.jsonl", [early, late])
    read = read_chat([file], TEMPLATE, 150, truncate=True)
    assert read.truncated == 1
    assert read.counts == {"answer cut away": 1}
    assert read.conversations.lengths.tolist() == [150]
    assert read.conversations.tokens[-1] != EOS_ID


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("none.jsonl", None, FileNotFoundError, "no such file of conversations"),
        ("talk.txt", b"x", ValueError, "conversations are read from .json, .jsonl, .ndjson, .parquet files"),
        ("talk.json", b'[{"prompt": "a"', ValueError, "not JSON, or not all of it"),
        ("talk.jsonl", b"", ValueError, "no conversation to learn from .no records."),
        ("talk.jsonl", b'{"text": 1}', ValueError, "1 unknown shape; the first: its keys are text"),
        ("talk.jsonl.gz", gzip.compress(b"{}" * 99, mtime=0)[:-9], ValueError, "damaged .it ends early."),
        ("talk.parquet", b"PAR1 nothing", ValueError, "damaged, or no parquet file"),
    ],
)
def test_files_that_cannot_be_read(
    tmp_path: Path, name: str, content: bytes | None, error: type[Exception], words: str
) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(error, match=words) as raised:
        read_chat([file], TEMPLATE, 100)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_holding_out_depends_on_the_text_alone(tmp_path: Path) -> None:
    found = conversations(tmp_path, 200)
    chosen = held_out_ones(found, 0.2)
    assert 20 <= chosen.sum() <= 60
    assert not held_out_ones(found, 0.0).any()
    assert held_out_ones(found, 1e-12).sum() == 1
    half = np.arange(200) % 2 == 0
    assert (held_out_ones(found.those(half), 0.2) == chosen[half]).all()
    kept = found.those(~chosen)
    assert len(kept) == 200 - chosen.sum()
    first = int(np.flatnonzero(~chosen)[0])
    own = slice(found.starts[first], found.ends[first])
    assert kept.tokens[: kept.ends[0]].tolist() == found.tokens[own].tolist()


def test_real_data_is_read_whole(shared: Path) -> None:
    template = ChatTemplate(DEFAULT, Tokenizer.load(shared / "tokenizer" / "llama_sp_32k.tokenizer.model"))
    files = {
        "instruct/dolly_hhrlhf_train_small.jsonl": 1000,
        "instruct/rasbt_instruction-data.json": 1100,
        "toolcall/glaive_toolcall_en_demo.json": 300,
    }
    for name, count in files.items():
        read = read_chat([shared / name], template, 1 << 20)
        assert not read.skips
        assert len(read.conversations) == count
        assert read.conversations.trained.sum() > 0.3 * len(read.conversations.tokens)
    questions = list(read_talks(sorted((shared / "toolcall").glob("BFCL_*[a-z].json"))))
    reasons = {found.talk.reason for found in questions if isinstance(found.talk, Skip)}
    assert reasons == {
        "no assistant turn",
        "unknown shape",
    }  # questions to test with, and their answers apart
    talk = next(iter(read_talks([shared / "instruct" / "dolly_hhrlhf_train_small.jsonl"]))).talk
    assert not isinstance(talk, Skip)
    assert talk.messages[0] == {"role": "user", "content": "what is kangen water?"}
