"""`mobilellm bench`: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import SHAPE, exported, saved, shared

from absent_packages import without
from mobilellm.cli.main import _main
from mobilellm.runtime import engine

from .refusals import refusal

if (fault := engine.missing()) is not None:
    pytest.skip(f"the native engine was not compiled: {fault}", allow_module_level=True)

QUICK = ["--rounds", "1", "--threads", "2"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("bench"), "Q4_0", shared("immediate", 2))[0]


def test_both_caches_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = exported(tmp_path, "Q8_0", replace(SHAPE, head_dim=64))[0]
    both = ["--kv-cache", "f16", "q8_0", *QUICK, "--json", "-"]
    for command in (["decode", "--depths", "40", "--tokens", "4"], ["load", "--context", "90"]):
        assert _main(["bench", command[0], str(wide), *command[1:], *both]) == 0
        plain, small = json.loads(capsys.readouterr().out)["tests"]
        assert (plain["engine"], small["engine"]) == ("mobilellm", "mobilellm, cache q8_0")
        if command[0] == "decode":
            assert (plain["type_k"], small["type_k"], small["type_v"]) == ("f16", "q8_0", "q8_0")
            assert small["cache_bytes_per_token"] * 32 == plain["cache_bytes_per_token"] * 17
        else:
            assert small["cache_bytes"] * 32 == plain["cache_bytes"] * 17
    for wrong, told in (
        ([str(wide), "--kv-cache", "f16", "f16"], "--kv-cache f16 f16: name each type once"),
        ([str(wide), "--kv-cache"], "--kv-cache needs a value: f16, q8_0 or both"),
        ([str(tmp_path / "model"), "--kv-cache", "q8_0"], "--kv-cache q8_0 is for .gguf files"),
    ):
        assert _main(["bench", "decode", *wrong]) == 2
        assert told in capsys.readouterr().err


def test_decode(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "decode.json", tmp_path / "decode.png"
    command = ["bench", "decode", str(file), "--depths", "0", "70", "--tokens", "6", *QUICK]
    assert _main([*command, "--json", str(out), "--png", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "6 after 70" in printed
    assert "2 threads, 1 round." in printed
    assert "Memory was read at" in printed
    written = json.loads(out.read_text(encoding="utf-8"))
    assert (written["measured"], written["threads"], written["rounds"]) == ("decode", 2, 1)
    first, second = written["tests"]
    of_llama_bench = {
        "build_commit", "cpu_info", "model_filename", "model_type", "model_size", "model_n_params", "n_threads", "type_k",
        "type_v", "n_prompt", "n_gen", "n_depth", "test_time", "avg_ns", "stddev_ns", "avg_ts", "stddev_ts",
    }  # fmt: skip
    assert of_llama_bench <= first.keys()
    assert (first["model_type"], first["n_gen"], first["n_depth"]) == ("mobilellm Q4_0", 6, 0)
    assert second["n_depth"] == 70
    assert 0 < first["share_of_bandwidth"] < 1
    assert first["avg_ts"] == pytest.approx(6e9 / first["avg_ns"], rel=1e-3)  # of one round
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_prefill_as_json(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["bench", "prefill", str(file), "--prompts", "40", *QUICK, "--json", "-"]) == 0
    (test,) = json.loads(capsys.readouterr().out)["tests"]
    assert (test["n_prompt"], test["n_gen"], test["engine"]) == (40, 0, "mobilellm")


def test_load(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "load.png"
    command = ["bench", "load", str(file), "--context", "90", *QUICK, "--png", str(picture)]
    assert _main(command) == 0
    printed = capsys.readouterr().out
    assert "first token" in printed
    assert "of a sequence of 90 tokens" in printed
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_lengths_are_as_long_as_the_context(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """96 tokens: of the usual depths only 0 is left, of the usual prompts none."""
    assert _main(["bench", "decode", str(file), "--tokens", "2", *QUICK, "--json", "-"]) == 0
    assert [test["n_depth"] for test in json.loads(capsys.readouterr().out)["tests"]] == [0]
    assert _main(["bench", "prefill", str(file), *QUICK, "--json", "-"]) == 0
    assert [test["n_prompt"] for test in json.loads(capsys.readouterr().out)["tests"]] == [96]


def test_peers_that_are_not_installed_are_named(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mobilellm.cli import bench

    monkeypatch.setattr(bench, "missing_packages", lambda *names: list(names))
    command = ["bench", "prefill", str(file), "--prompts", "8", *QUICK, "--peers", "--json", "-"]
    assert _main(command) == 0
    notes = json.loads(capsys.readouterr().out)["notes"]
    assert notes[0].startswith("llama.cpp is not installed; to measure it: ")
    assert "[peers]" in notes[0]
    assert notes[1].startswith("transformers is not installed; to measure it: ")
    assert _main([*command[:-2], "transformers", "--json", "-"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["notes"]
    assert only == notes[1]


def test_threads(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "threads.json", tmp_path / "threads.png"
    command = ["bench", "threads", str(file), "--counts", "1", "3", "--tokens", "6", "--rounds", "2"]
    assert _main([*command, "--json", str(out), "--png", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert f"{file}, mobilellm: best for decoding " in printed
    assert "; 2 rounds." in printed
    written = json.loads(out.read_text(encoding="utf-8"))
    (best,) = written["best_threads"]
    assert {best["decode"], best["prefill"]} <= {1, 3}
    assert (best["model"], written["measured"]) == (str(file), "threads")
    tests = written["tests"]
    assert [(test["n_threads"], test["n_gen"], test["n_prompt"]) for test in tests] == [
        (1, 6, 0), (3, 6, 0), (1, 0, 96), (3, 0, 96),
    ]  # fmt: skip
    rates = {test["n_threads"]: test["median_ts"] for test in tests if test["n_gen"]}
    assert rates[best["decode"]] > 0.94 * max(rates.values())
    assert tests[0]["read_gb_per_second"] > 0
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_threads_up_to_the_cores_there_are(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mobilellm.cli import bench
    from mobilellm.runtime.cores import Cores

    monkeypatch.setattr(bench, "cores", lambda: Cores(fast=2, usable=3))
    command = [
        "bench",
        "threads",
        str(file),
        "--tokens",
        "2",
        "--prompt",
        "4",
        "--rounds",
        "1",
        "--json",
        "-",
    ]
    assert _main(command) == 0
    tests = json.loads(capsys.readouterr().out)["tests"]
    assert [test["n_threads"] for test in tests if test["n_gen"]] == [1, 2, 3]
    assert _main([*command, "--counts", "2", "1", "2"]) == 0
    tests = json.loads(capsys.readouterr().out)["tests"]
    assert [(test["n_threads"], len(test["samples_ns"])) for test in tests] == [(2, 1), (1, 1)] * 2
    assert _main(["bench", "threads", str(file.parent / "model")]) == 2  # what the file was made of
    assert "model: threads are measured of .gguf files alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["decode"], "bench: name at least one model"),
        (["decode", "nowhere.gguf"], "nowhere.gguf: no such file"),
        (["decode", "125m"], "'125m' is no file; for random weights write SHAPE:TYPE, e.g. 125m:Q8_0"),
        (["decode", "FILE", "--depths", "95", "--tokens", "2"], "--depths 95 and 2 tokens after it do not fit FILE, whose context is 96; take fewer"),
        (["decode", "FILE", "--depths", "-1"], "--depths -1 must be at least 0"),
        (["decode", "FILE", "--tokens", "0"], "--tokens 0 must be at least 1"),
        (["prefill", "FILE", "--prompts", "97"], "--prompts 97 do not fit FILE, whose context is 96; take fewer"),
        (["load", "FILE", "--context", "1"], "--context 1 must be at least 2"),
        (["load", "FILE", "--rounds", "0"], "--rounds 0 must be at least 1"),
        (["load", "FILE", "--threads", "0"], "--threads 0 must lie in 1 … 256"),
        (["decode", "FILE", "--depths"], "--depths needs a value"),
        (["prefill", "FILE", "--peers", "llama"], "--peers 'llama' must be llama.cpp or transformers, did you mean llama.cpp?"),
        (["threads", "FILE", "--counts", "2", "0"], "--counts 0 must be at least 1"),
        (["threads", "FILE", "--counts", "300"], "threads = 300 must lie in 1 … 256"),
        (["threads", "FILE", "--prompt", "97"], "--prompt 97 do not fit FILE, whose context is 96; take fewer"),
        (["decode", "FILE", "--json", "/"], "/: is a folder; name a file in it"),
        (["load", "FILE", "--png", "a.svg"], "a.svg: the name of the picture must end in .png"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_code_2(
    file: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    said = refusal(capsys, "bench", *(file if each == "FILE" else each for each in arguments))
    assert message.replace("FILE", str(file)) in said


@pytest.mark.slow
def test_a_directory_and_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "model", SHAPE)
    command = [
        "bench",
        "decode",
        str(tmp_path / "model"),
        "--depths",
        "8",
        "--tokens",
        "4",
        *QUICK,
        "--peers",
        "--json",
        "-",
    ]
    assert _main(command) == 0
    tests = json.loads(capsys.readouterr().out)["tests"]
    assert {"mobilellm torch", "transformers"} <= {test["engine"] for test in tests}
    theirs = next(test for test in tests if test["engine"] == "transformers")
    assert theirs["mobilellm_times_faster"] > 0
    assert theirs["memory_gb_per_second"] is None


def test_random_weights_without_the_package_that_writes_them() -> None:
    script = without("gguf") + "from mobilellm.cli.main import main; main(['bench', 'decode', 'test:F32'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "bench needs the package 'gguf'; install it with: " in done.stderr
