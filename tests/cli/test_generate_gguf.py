"""`mobilellm generate FILE.gguf`: what the runtime adds, and what does not go with other models."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf_files import SHAPE, exported, saved

from mobilellm.cli.main import _main
from mobilellm.export.export import export
from mobilellm.export.targets import KINDS, Options

from .refusals import refusal

CHAT = "some words to learn pieces from"
SAMPLED = ("--temperature", "1", "--seed", "3", "--max-tokens", "12")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(exported(tmp_path_factory.mktemp("gguf"), "Q8_0")[0])


def row(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert _main(["generate", *arguments, "--json"]) == 0
    (only,) = json.loads(capsys.readouterr().out)["completions"]
    return only  # type: ignore[no-any-return]


def test_a_session_is_kept_between_commands(
    capsys: pytest.CaptureFixture[str], file: str, tmp_path: Path
) -> None:
    kept = ("--session", str(tmp_path / "chat.session"))
    first = row(capsys, file, CHAT, *SAMPLED, *kept)
    assert first == row(capsys, file, CHAT, *SAMPLED)
    longer = CHAT + first["text"] + " and more"
    second = row(capsys, file, longer, *SAMPLED, *kept)
    fresh = row(capsys, file, longer, *SAMPLED)
    assert second["text"] == fresh["text"]
    assert second["usage"]["reused"] > 10
    assert second["usage"]["fed"] == fresh["usage"]["fed"] - second["usage"]["reused"]
    assert _main(["generate", file, longer, *SAMPLED, *kept]) == 0
    assert capsys.readouterr().out == f"{longer}{second['text']}\n"


def test_keys_and_values_may_be_kept_in_8_bits(
    capsys: pytest.CaptureFixture[str], file: str, tmp_path: Path
) -> None:
    wide = str(exported(tmp_path, "Q8_0", replace(SHAPE, head_dim=32))[0])
    bytes_kept, small = tmp_path / "chat.session", ("--kv-cache", "q8_0")
    first = row(capsys, wide, CHAT, *SAMPLED, *small, "--session", str(bytes_kept))
    assert first == row(capsys, wide, CHAT, *SAMPLED, *small)
    assert (
        "was saved with keys and values in q8_0, and this model keeps them in f16; load it with"
        in refusal(capsys, "generate", wide, CHAT, "--session", str(bytes_kept))
    )
    assert "which do not divide this model's heads of 16; choose f16" in refusal(
        capsys, "generate", file, CHAT, *small
    )
    assert "'q4_0'" in refusal(capsys, "generate", wide, CHAT, "--kv-cache", "q4_0")


def test_guesses_are_counted_and_change_nothing(capsys: pytest.CaptureFixture[str], file: str) -> None:
    for options in (SAMPLED, ("--max-tokens", "30")):
        plain = row(capsys, file, "some words some words some", *options)
        guessed = row(capsys, file, "some words some words some", *options, "--prompt-lookup", "4")
        usage, without = guessed.pop("usage"), plain.pop("usage")
        assert guessed == plain
        assert without["guessed"] == 0
        assert 0 <= usage["accepted"] <= usage["guessed"]


def test_the_end_of_the_context_is_a_choice(capsys: pytest.CaptureFixture[str], file: str) -> None:
    context = SHAPE.max_position_embeddings
    asked = (file, "some", "--temperature", "2", "--seed", "0", "--max-tokens", str(2 * context))
    line = refusal(capsys, "generate", *asked)
    assert f"and {2 * context} new ones do not fit the model's context of {context}; ask for at most" in line
    stopped, slid = (row(capsys, *asked, "--context", policy) for policy in ("stop", "slide"))
    assert stopped["finish"] == "context"
    assert slid["finish"] == "length"
    assert len(slid["tokens"]) == 2 * context
    assert slid["tokens"][: len(stopped["tokens"])] == stopped["tokens"]
    line = refusal(capsys, "generate", file, "some", "--context", "slide")
    assert "--context 'slide' has no end of its own; say max_new_tokens" in line


@pytest.mark.parametrize("threads", ["1", "3"])
def test_threads_change_nothing(capsys: pytest.CaptureFixture[str], file: str, threads: str) -> None:
    assert row(capsys, file, CHAT, *SAMPLED, "--threads", threads) == row(capsys, file, CHAT, *SAMPLED)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--prompt-lookup", "-1"), "--prompt-lookup -1 must be a whole number, 0 … 64"),
        (("--context", "roll"), "--context"),
        (("--threads", "0"), "--threads 0 must lie in 1 … 256"),
        (("--dtype", "float32"), "--dtype float32 does not go with"),
        (("--device", "cuda"), "--device cuda does not go with"),
        (("another prompt", "--session", "x"), "--session x goes with one prompt; 2 were given"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], file: str, arguments: tuple[str, ...], words: str
) -> None:
    assert words in refusal(capsys, "generate", file, CHAT, *arguments)


def test_a_file_that_is_no_session_is_refused_and_left(
    capsys: pytest.CaptureFixture[str], file: str, tmp_path: Path
) -> None:
    other = tmp_path / "notes.txt"
    other.write_text("notes")
    assert f"{other}: is no session file, or cut off" in refusal(
        capsys, "generate", file, CHAT, "--session", str(other)
    )
    assert other.read_text() == "notes"
    assert "is a directory; name a session file" in refusal(
        capsys, "generate", file, CHAT, "--session", str(tmp_path)
    )
    unfit = tmp_path / "new.session"
    refusal(capsys, "generate", file, "x" * 500, "--session", str(unfit))
    assert not unfit.exists()


@pytest.mark.parametrize(
    "option",
    [
        ("--context", "slide"),
        ("--prompt-lookup", "3"),
        ("--session", "x"),
        ("--threads", "2"),
        ("--kv-cache", "q8_0"),
    ],
)
def test_what_only_the_runtime_has_is_refused_elsewhere(
    capsys: pytest.CaptureFixture[str], file: str, option: tuple[str, str]
) -> None:
    directory = str(Path(file).parent / "model")
    assert f"{option[0]} {option[1]} is for .gguf files; " in refusal(
        capsys, "generate", directory, CHAT, *option
    )


def test_a_directory_of_onnx_runtime_completes_too(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnx", reason="needs the extra onnx")
    saved(tmp_path / "model", SHAPE)
    export(tmp_path / "model", tmp_path / "onnx", KINDS["onnx"], Options("fp32"), compare=False)
    directory = str(tmp_path / "onnx.unverified")
    expected = row(capsys, str(tmp_path / "model"), CHAT, "--max-tokens", "12")
    given = row(capsys, directory, CHAT, "--max-tokens", "12")
    assert given["text"] == expected["text"]
    assert given["usage"]["prompt"] > 3
    assert row(capsys, directory, CHAT, "--max-tokens", "12", "--prompt-lookup", "3")["text"] == given["text"]
    line = refusal(capsys, "generate", directory, CHAT, "--dtype", "float32")
    assert "--dtype float32 does not go with" in line
    assert "which runs as it is stored" in line
    assert "--session x is for .gguf files" in refusal(capsys, "generate", directory, CHAT, "--session", "x")
