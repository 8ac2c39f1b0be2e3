"""The quickstart as a person uses it: a run, a second look, Ctrl-C and going on, and its refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy

from mobilellm.cli.main import _main

STEPS = 12


def quickstart(folder: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "mobilellm",
        "quickstart",
        "--out",
        str(folder),
        "--steps",
        str(STEPS),
        *flags,
    ]


def finish(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> tuple[Path, str]:
    """A run that nothing interrupted, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart") / "run"
    return folder, finish(quickstart(folder, "--text", str(small_text)))


def test_makes_everything(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    for stage in range(1, 7):
        assert f"[{stage}/6]" in printed
    results = json.loads((folder / "report.json").read_text())
    assert results["after"]["bits_per_byte"] < 0.9 * results["before"]["bits_per_byte"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert f"{results['after']['bits_per_byte']:.3f}" in page
    assert "http://" not in page
    assert "https://" not in page
    assert (folder / "model" / "model.safetensors").is_file()
    assert "tokens/s" in printed


def test_second_time_is_quick_and_trains_nothing(whole: tuple[Path, str], small_text: Path) -> None:
    folder, _ = whole
    before = (folder / "metrics.jsonl").read_bytes()
    printed = finish(quickstart(folder, "--text", str(small_text)))
    assert "complete" in printed
    assert "pretraining" not in printed
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_run_directory_generates(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["generate", str(whole[0]), "Return a", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("Return a")


def test_ctrl_c_and_going_on_gives_the_same_model(
    whole: tuple[Path, str], tmp_path: Path, small_text: Path
) -> None:
    folder = tmp_path / "run"
    command = quickstart(folder, "--text", str(small_text))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _wait_for(
        lambda: '"loss"' in _text(folder / "metrics.jsonl") and '"step": 3' in _text(folder / "metrics.jsonl")
    )
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "goes on" in printed
    assert not (folder / "report.json").exists()
    finish([sys.executable, "-m", "mobilellm", "generate", str(folder), "It", "--max-tokens", "3"])
    assert "going on from step-" in finish(command)
    ours, theirs = (
        safetensors.numpy.load_file(path / "model" / "model.safetensors") for path in (folder, whole[0])
    )
    for name, tensor in theirs.items():
        assert (ours[name] == tensor).all(), name


def test_ctrl_c_while_preparing(tmp_path: Path, small_text: Path) -> None:
    folder = tmp_path / "run"
    command = quickstart(folder, "--text", str(small_text))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _wait_for(lambda: (folder / "quickstart.json").exists())
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert "same command" in printed
    finish(command)


def test_fresh_deletes_only_what_the_run_made(tmp_path: Path, small_text: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "quickstart.json").write_text("{}")
    (folder / "mine.txt").write_text(small_text.read_text())
    command = quickstart(folder, "--text", str(folder / "mine.txt"), "--steps", "1", "--fresh")
    assert "[6/6]" in finish(command)
    assert (folder / "mine.txt").is_file()


def test_refusals(whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = whole
    other = tmp_path / "other.txt"
    other.write_text("other text " * 1000)
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for flags, words in (
        (["--out", str(folder), "--text", str(other)], ["--fresh", str(folder)]),
        (["--out", str(tmp_path / "taken")], ["not a quickstart run"]),
        (["--out", str(tmp_path / "a"), "--text", str(tmp_path / "absent.txt")], ["absent.txt"]),
        (["--out", str(tmp_path / "b"), "--text", str(empty)], ["empty.txt", "no text"]),
        (["--out", str(tmp_path / "c"), "--text", str(other)], ["more text"]),
        (["--out", str(tmp_path / "d"), "--steps", "0"], ["steps"]),
    ):
        assert _main(["quickstart", *flags]) == 2, flags
        captured = capsys.readouterr()
        assert captured.err.count("\n") == 1, captured.err
        for word in words:
            assert word in captured.err
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _wait_for(condition: object, seconds: float = 120) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.02)


assert os.name == "posix"  # signals as above
