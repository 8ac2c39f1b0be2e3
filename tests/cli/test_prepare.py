"""`mobilellm prepare` and `mobilellm tokenizer train` as a person uses them."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mobilellm.cli.main import _main
from mobilellm.data.shards import read_index, read_split, verify
from mobilellm.installation import install_command
from mobilellm.tokenizer import Tokenizer
from tokenizer_oracles import trained


def texts(count: int, name: str = "text") -> str:
    return "".join(
        json.dumps({"text": f"{name} {i}: it is one of many, and says little."}) + "\n" for i in range(count)
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    trained().save(tmp_path / "tok")
    (tmp_path / "x.jsonl").write_text(texts(500) + "nonsense\n" + texts(3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare(*arguments: str) -> int:
    return _main(["prepare", *arguments, "--tokenizer", "tok", "--workers", "1"])


def test_what_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "in").mkdir()
    (folder / "x.jsonl").rename(folder / "in" / "x.jsonl")
    (folder / "in" / "README.md").write_text("x")
    assert prepare("in", "--out", "out", "--held-out", "0.1", "--licence", "CC0", "--source", "made up") == 0
    printed, errors = capsys.readouterr()
    index = read_index(folder / "out")
    assert (index.licence, index.source) == ("CC0", "made up")
    assert index.rejected == {"duplicate": 3, "unreadable line": 1}
    assert f"{index.total('train', 'tokens'):,} tokens" in printed
    assert f"{index.total('held-out', 'documents'):,} documents" in printed
    assert "rejected              3 duplicate" in printed
    assert "listed in out/rejected.jsonl" in printed
    assert "passed over 1 files whose names do not tell what they are (in/README.md)" in printed
    assert "MB of text a second" in printed
    assert errors == ""
    assert prepare("in", "--out", "out", "--held-out", "0.1", "--licence", "CC0", "--source", "made up") == 0
    assert "out: already made by the same command" in capsys.readouterr().out
    tokenizer = Tokenizer.load(folder / "out" / "tokenizer")
    assert len(read_split(folder / "out", "train", tokenizer)) == index.total("train", "tokens")


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("x.jsonl", "--out", "out", "--json") == 0
    printed, errors = capsys.readouterr()
    facts = json.loads(printed)
    index = read_index(folder / "out")
    assert facts["splits"]["train"]["tokens"] == index.total("train", "tokens")
    assert facts["rejected"] == index.rejected
    assert facts["tokenizer"] == trained().fingerprint
    assert facts["seconds"] > 0
    assert facts["source"] == "x.jsonl"
    assert errors == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["x.jsonl", "--text-field", "body"],
            "none of 504 records has the text field 'body'; they have text: choose",
        ),
        (["missing.jsonl"], "missing.jsonl: no such file or folder"),
        ([], "no input"),
        (["-"], "standard input: say what it holds"),
        (["x.jsonl", "--rules.max-symbols", "0.5"], "--rules are limits of --quality"),
        (
            ["x.jsonl", "--quality", "--rules.max-symbols", "5"],
            "--rules.max-symbols 5.0 must lie between 0 and 1",
        ),
        (["x.jsonl", "--held-out", "2"], "--held-out 2.0 must lie"),
        (["x.jsonl", "--workers", "0"], "--workers 0 must"),
    ],
    ids=str,
)
def test_refusals_are_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert _main(["prepare", *arguments, "--tokenizer", "tok", "--out", "out"]) == 2
    printed, errors = capsys.readouterr()
    assert printed == ""
    assert errors.startswith("mobilellm: error: ")
    assert errors.count("\n") == 1
    assert words in errors
    assert sorted(path.name for path in folder.iterdir()) == ["tok", "x.jsonl"]


def test_quality_rules_are_flags(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("x.jsonl", "--out", "out", "--quality", "--rules.min-characters", "20", "--json") == 0
    assert "quality: min_characters" not in json.loads(capsys.readouterr().out)["rejected"]
    assert prepare("x.jsonl", "--out", "strict", "--quality", "--rules.min-characters", "44", "--json") == 0
    assert json.loads(capsys.readouterr().out)["rejected"]["quality: min_characters"] > 5
    assert read_index(folder / "strict").preparation["quality"]["min_characters"] == 44


def test_what_needs_a_package_says_which(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    assert prepare("x.jsonl", "--out", "out", "--near-duplicates", "0.8") == 2
    assert (
        capsys.readouterr().err
        == f"mobilellm: error: prepare needs the package 'datasketch'; install it with: {install_command('data')}\n"
    )
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (folder / "x.parquet").write_bytes(b"PAR1")
    assert prepare("x.parquet", "--out", "out") == 2
    assert install_command("data") in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "zstandard", None)
    (folder / "x.txt.zst").write_bytes(b"\x28\xb5\x2f\xfd.....")
    assert prepare("x.txt.zst", "--out", "out") == 2
    assert f"'zstandard'; install it with: {install_command('data')}" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["tok", "x.jsonl", "x.parquet", "x.txt.zst"]


def test_text_and_json_lines_need_the_base_install_alone(folder: Path) -> None:
    script = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name in ("pyarrow", "zstandard", "datasets", "datasketch", "scipy", "torch", "transformers"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from mobilellm.cli.main import main
main(sys.argv[1:])
"""
    command = [
        sys.executable,
        "-c",
        script,
        "prepare",
        "x.jsonl",
        "--tokenizer",
        "tok",
        "--out",
        "out",
        "--quality",
        "--rules.min-characters",
        "5",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_where_it_can_go_on(folder: Path, number: int, code: int) -> None:
    (folder / "x.jsonl").write_text(texts(3000))
    command = [
        sys.executable,
        "-m",
        "mobilellm",
        "prepare",
        "-",
        "--format",
        "jsonl",
        "--tokenizer",
        "tok",
        "--out",
        "out",
    ]
    command += ["--checkpoint-seconds", "0", "--workers", "1"]
    content = (folder / "x.jsonl").read_bytes() * 40  # several chunks
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=False) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(content)  # and then nothing comes: it waits
        process.stdin.flush()
        deadline = time.monotonic() + 120
        while not (folder / "out.partial" / "journal.json").exists():
            assert time.monotonic() < deadline, "it never got there"
            time.sleep(0.02)
        process.send_signal(number)
        errors = process.stderr.read().decode()
        assert process.wait() == code
    assert errors.strip() == "Stopped. What is done is safe; the same command goes on from there."
    done = subprocess.run(command, input=content, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(b"going on after ")
    verify(folder / "out")
    index = read_index(folder / "out")
    assert index.total("train", "documents") + index.total("held-out", "documents") == 3000
    assert index.rejected == {"duplicate": 117_000}


def test_a_bar_on_a_terminal(folder: Path) -> None:
    (folder / "x.jsonl").write_text(texts(3000))
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "mobilellm",
        "prepare",
        "x.jsonl",
        "--tokenizer",
        "tok",
        "--out",
        "out",
        "--workers",
        "1",
    ]
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs, env=environment) as process:
        os.close(theirs)
        shown = b""
        while True:
            try:
                block = os.read(ours, 65536)
            except OSError:
                break
            if not block:
                break
            shown += block
        assert process.wait() == 0
    os.close(ours)
    text = shown.decode()
    assert "3,000 documents" in text
    assert "100%" in text
    assert "MB/s" in text


# The tokenizer


def test_a_tokenizer_is_trained(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "x.jsonl").write_text(texts(500, "Some words"))
    assert _main(["tokenizer", "train", "x.jsonl", "--vocab-size", "300", "--out", "new", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    tokenizer = Tokenizer.load(folder / "new")
    assert (facts["fingerprint"], facts["vocab_size"]) == (tokenizer.fingerprint, 300)
    assert facts["sample_bytes"] == facts["text_bytes"]
    assert tokenizer.decode(tokenizer.encode("Some words 7")) == "Some words 7"
    assert _main(["tokenizer", "train", "x.jsonl", "--vocab-size", "300", "--out", "new"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (
        _main(
            [
                "tokenizer",
                "train",
                "x.jsonl",
                "--vocab-size",
                "290",
                "--out",
                "new",
                "--overwrite",
                "--sample-megabytes",
                "0.01",
            ]
        )
        == 0
    )
    printed, errors = capsys.readouterr()
    assert "training on 0.0 of 0.0 MB" in errors
    assert f"sample_bytes           {9_900}"[:-4] in printed
    assert Tokenizer.load(folder / "new").vocab_size == 290


def test_a_separator_stays_out_of_the_vocabulary(folder: Path) -> None:
    (folder / "x.txt").write_text("<|endoftext|>\n".join(f"Story {i} is short.\n" for i in range(200)))
    arguments = ["tokenizer", "train", "x.txt", "--vocab-size", "280", "--out", "new"]
    assert _main([*arguments, "--document-separator", "<|endoftext|>"]) == 0
    assert not any("endo" in piece for piece in Tokenizer.load(folder / "new").pieces)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "x.jsonl", "--vocab-size", "100"], "--vocab-size 100 is too small"),
        (["train", "x.jsonl", "--vocab-size", "99999"], "too large for this text"),
        (
            ["train", "x.jsonl", "--vocab-size", "300", "--text-field", "body"],
            "records have the fields text, not 'body'",
        ),
        (["test", "x.jsonl", "--vocab-size", "300"], "needs the word train first"),
        *[
            (["train", "x.jsonl", "--vocab-size", "300", flag, value], f"{flag} {value} must")
            for flag, value in [
                ("--sample-megabytes", "inf"),
                ("--sample-megabytes", "nan"),
                ("--sample-megabytes", "-5.0"),
                ("--min-frequency", "-1"),
                ("--max-piece-length", "0"),
                ("--character-coverage", "1.5"),
            ]
        ],
    ],
    ids=str,
)
def test_a_tokenizer_that_cannot_be(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    (folder / "x.jsonl").write_text(texts(50))
    assert _main(["tokenizer", *arguments, "--out", "new"]) == 2
    *before, error = capsys.readouterr().err.splitlines()
    assert words in error
    assert not before or "too large" in error  # all else is said before the text is read
    assert not (folder / "new").exists()
