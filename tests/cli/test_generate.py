"""`mobilellm generate`: what is streamed is what was generated, and mistakes cost one line."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files import exported

import mobilellm
from mobilellm import Sampling
from mobilellm.cli.main import _main
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from tokenizer_oracles import trained

from .refusals import refusal

CONTEXT = 60
CONFIG = replace(preset("test-ls"), vocab_size=700, max_position_embeddings=CONTEXT)
PROMPT = "def main("
SAMPLED = ("--temperature", "1", "--seed", "3", "--max-tokens", "30")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A directory with random weights, large enough for varied text."""
    directory = tmp_path_factory.mktemp("generate") / "model"
    random = MobileLLM(CONFIG, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in random.parameters():
            parameter.normal_(
                parameter.ndim == 1, 0.2, generator=torch.Generator().manual_seed(parameter.numel())
            )
    checkpoint.save(directory, random, trained())
    return str(directory)


def output(capsys: pytest.CaptureFixture[str], *arguments: str, said: str = "") -> str:
    """What is printed; `said` is what goes to stderr."""
    assert _main(["generate", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == said
    return captured.out


def completions(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    answer = json.loads(output(capsys, *arguments, "--json"))
    return answer["completions"]  # type: ignore[no-any-return]


def text_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    (completion,) = completions(capsys, *arguments)
    return completion["text"]  # type: ignore[no-any-return]


COMMAND = [sys.executable, "-m", "mobilellm", "generate"]


def process(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, timeout=300, check=False, **options)


def test_the_stream_is_the_prompt_and_its_completion(capsys: pytest.CaptureFixture[str], model: str) -> None:
    for options in (SAMPLED, ("--max-tokens", "7"), (*SAMPLED, "--top-k", "20", "--top-p", "0.9")):
        text = text_of(capsys, model, PROMPT, *options)
        assert output(capsys, model, PROMPT, *options) == f"{PROMPT}{text}\n"


def test_json_is_one_object_and_says_it_all(capsys: pytest.CaptureFixture[str], model: str) -> None:
    answer = json.loads(output(capsys, model, PROMPT, *SAMPLED, "--min-p", "0.01", "--json"))
    expected = Sampling(temperature=1.0, seed=3, min_p=0.01)
    assert answer["sampling"] == vars(expected)
    (row,) = answer["completions"]
    (completion,) = mobilellm.generate(model, PROMPT, expected, 30)
    assert row == {"prompt": PROMPT, **completion._asdict()}
    assert len(row["tokens"]) == 30
    assert row["finish"] == "length"


def test_greedy_by_default(capsys: pytest.CaptureFixture[str], model: str) -> None:
    (row,) = completions(capsys, model, PROMPT, "--max-tokens", "5")
    tokens = trained().encode(PROMPT)
    loaded = mobilellm.load(model).model
    for token in row["tokens"]:
        with torch.no_grad():
            assert token == int(loaded(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)


def test_seeds(capsys: pytest.CaptureFixture[str], model: str) -> None:
    first = text_of(capsys, model, PROMPT, *SAMPLED)
    assert text_of(capsys, model, PROMPT, *SAMPLED) == first
    assert text_of(capsys, model, PROMPT, *SAMPLED, "--seed", "4") != first
    unseeded = {text_of(capsys, model, PROMPT, "--temperature", "1", "--max-tokens", "30") for _ in range(3)}
    assert len(unseeded) == 3


def test_several_prompts(capsys: pytest.CaptureFixture[str], model: str) -> None:
    prompts = (PROMPT, "x", "", "class Model:\n    ")
    rows = completions(capsys, model, *prompts, "--max-tokens", "6")
    assert [row["prompt"] for row in rows] == list(prompts)
    for row in rows:
        assert row["text"] == text_of(capsys, model, row["prompt"], "--max-tokens", "6")
    shown = output(capsys, model, *prompts, "--max-tokens", "6")
    assert shown == "".join(f"{row['prompt']}{row['text']}\n\n" for row in rows)


def test_an_empty_prompt_is_a_beginning(capsys: pytest.CaptureFixture[str], model: str) -> None:
    """BOS alone; the space that encoding puts in front of a text is not shown."""
    (row,) = completions(capsys, model, "", *SAMPLED)
    assert row["text"] == trained().decode(row["tokens"])
    assert output(capsys, model, "", *SAMPLED) == f"{row['text']}\n"


@pytest.mark.parametrize("text", [PROMPT, PROMPT + "\n", "two\nlines\n\n", "", "\n", "日本 🙂"])
def test_the_prompt_from_standard_input(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, model: str, text: str
) -> None:
    """Less one line end, which `echo` adds."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    (row,) = completions(capsys, model, "--max-tokens", "4")
    assert row["prompt"] == text.removesuffix("\n")
    assert row["text"] == text_of(capsys, model, row["prompt"], "--max-tokens", "4")


def test_stop_strings(capsys: pytest.CaptureFixture[str], model: str) -> None:
    whole = text_of(capsys, model, PROMPT, *SAMPLED)
    first, second = whole[4:6], whole[8:11]
    expected = whole[: min(whole.index(first), whole.index(second))]
    options = (*SAMPLED, "--stop", first, "--stop", second, "--stop", "never in it")
    (row,) = completions(capsys, model, PROMPT, *options)
    assert (row["text"], row["finish"]) == (expected, "stop")
    assert output(capsys, model, PROMPT, *options) == f"{PROMPT}{expected}\n"
    (row,) = completions(capsys, model, PROMPT, *SAMPLED, "--stop", second)
    assert row["text"] == whole[: whole.index(second)]


def test_a_full_context_is_told(capsys: pytest.CaptureFixture[str], model: str) -> None:
    (row,) = completions(capsys, model, PROMPT, "--temperature", "1", "--seed", "1")
    assert row["finish"] == "context"
    assert len(row["tokens"]) == CONTEXT - len(trained().encode(PROMPT))
    said = "mobilellm: the model's context is full\n"
    shown = output(capsys, model, PROMPT, "--temperature", "1", "--seed", "1", said=said)
    assert shown == f"{PROMPT}{row['text']}\n"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(capsys: pytest.CaptureFixture[str], model: str, dtype: str) -> None:
    (row,) = completions(capsys, model, PROMPT, "--max-tokens", "5", "--dtype", dtype)
    (expected,) = mobilellm.generate(mobilellm.load(model, dtype), PROMPT, max_new_tokens=5)
    assert row["text"] == expected.text


def test_a_run_stands_for_its_model(capsys: pytest.CaptureFixture[str], model: str) -> None:
    run = str(Path(model).parent)
    assert text_of(capsys, run, PROMPT, *SAMPLED) == text_of(capsys, model, PROMPT, *SAMPLED)


# Mistakes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--temperature", "-1"), "--temperature -1.0 must be 0 (greedy) or above"),
        (("--temperature", "nan"), "--temperature nan must be"),
        (("--temperature", "hot"), "--temperature 'hot' must be a number"),
        (("--top-k", "-5"), "--top-k -5 must be"),
        (("--top-k", "2.5"), "--top-k"),
        (("--top-p", "0"), "--top-p 0.0 must be above 0"),
        (("--min-p", "1"), "--min-p 1.0 must be"),
        (("--repetition-penalty", "0"), "--repetition-penalty 0.0 must be above 0"),
        (("--seed", "-1"), "--seed -1 must be"),
        (("--max-tokens", "0"), "error: --max-tokens 0 must be at least 1"),
        (("--max-tokens", "many"), "--max-tokens"),
        (("--stop", ""), "a stop string is empty"),
        (("--stop",), "--stop needs a value"),
        (("--dtype", "int8"), "--dtype 'int8' is not known; choose one of float32"),
        (("--device", "warp"), "--device 'warp' cannot be used"),
        (("--device", "cuda:99"), "--device 'cuda:99' cannot be used"),
        (("--device", "meta"), "--device 'meta' cannot be used (it holds no values)"),
        (("--device", "mps"), "--device 'mps' cannot be used ("),
        (("--device", "mkldnn"), "--device 'mkldnn' cannot be used (this torch cannot compute on it)"),
        (("--device", ""), "--device '' cannot be used"),
        (("--nonsense",), "generate: --nonsense is not known"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_bad_options(
    capsys: pytest.CaptureFixture[str], model: str, arguments: tuple[str, ...], words: str
) -> None:
    assert words in refusal(capsys, "generate", model, PROMPT, *arguments)
    assert words in refusal(
        capsys, "generate", model, PROMPT, "more", *arguments
    )  # several prompts go another way


def test_a_prompt_longer_than_the_context(capsys: pytest.CaptureFixture[str], model: str) -> None:
    for prompts in (("word " * 50,), ("short", "word " * 50)):
        line = refusal(capsys, "generate", model, *prompts)
        assert f"tokens and the model's context is {CONTEXT}; shorten it to at most {CONTEXT - 1}" in line
        assert f"prompt {len(prompts) - 1} has " in line


def test_no_model(capsys: pytest.CaptureFixture[str], model: str, tmp_path: Path) -> None:
    assert "MODEL" in refusal(capsys, "generate")
    missing = str(tmp_path / "missing")
    assert f"{missing}: no such directory" in refusal(capsys, "generate", missing, PROMPT)
    assert "no config.json" in refusal(capsys, "generate", str(tmp_path), PROMPT)
    weights = str(Path(model) / "model.safetensors")
    assert f"is a file; name the directory that holds it, {model}" in refusal(
        capsys, "generate", weights, PROMPT
    )
    (tmp_path / "notes.txt").write_text("words")
    assert "notes.txt: is no model; name a model directory" in refusal(
        capsys, "generate", str(tmp_path / "notes.txt"), PROMPT
    )


def test_a_dash_is_standard_input(
    capsys: pytest.CaptureFixture[str], model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = text_of(capsys, model, PROMPT, *SAMPLED)
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n"))
    assert text_of(capsys, model, "-", *SAMPLED) == expected


def test_a_model_without_a_tokenizer(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "m", MobileLLM(CONFIG), None)
    assert "has no tokenizer.json or tokenizer.model" in refusal(
        capsys, "generate", str(tmp_path / "m"), PROMPT
    )


def test_text_that_is_no_unicode(capsys: pytest.CaptureFixture[str], model: str, file: str) -> None:
    refusal(capsys, "generate", model, os.fsdecode(b"a\xff"))
    for arguments, given in (((os.fsdecode(b"a\xff"),), b""), ((), b"a\xff")):
        done = process(file, *arguments, input=given)
        assert done.returncode == 2
        assert done.stderr.startswith(b"mobilellm: error: ")
        assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_bad_option_on_any_terminal(model: str, encoding: str) -> None:
    """Where the terminal has no box characters, the box around the message is of other signs."""
    done = process(model, "--stop", env={**os.environ, "PYTHONIOENCODING": encoding})
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == (
        "mobilellm: error: generate: --stop needs a value (mobilellm generate --help tells the arguments)\n"
    )


# As a process; of a .gguf file, which starts without torch


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(exported(tmp_path_factory.mktemp("gguf"), "Q8_0")[0])


def test_a_pipe(capsys: pytest.CaptureFixture[str], file: str) -> None:
    """The bytes of the text, and nothing else, whatever the reader."""
    done = process(file, *SAMPLED, input="日本".encode(), env={**os.environ, "PYTHONUTF8": "1"})
    assert (done.returncode, done.stderr) == (0, b"")
    text = text_of(capsys, file, "日本", *SAMPLED)
    assert done.stdout.decode() == f"日本{text}\n"


@pytest.mark.parametrize("several", [(), ("b", "c", "d")])
def test_a_reader_that_has_seen_enough(file: str, several: tuple[str, ...]) -> None:
    read, write = os.pipe()
    with subprocess.Popen([*COMMAND, file, "a", *several], stdout=write, stderr=subprocess.PIPE) as running:
        os.close(write)
        assert os.read(read, 1) == b"a"
        os.close(read)
        assert running.stderr is not None
        assert running.stderr.read() == b""
        assert running.wait(timeout=300) == 0


WAITING = """
import sys
from mobilellm.cli.main import main
class Waiting:
    def read(self):
        print("up", file=sys.__stdout__, flush=True)
        return sys.__stdin__.read()
sys.stdin = Waiting()
main()
"""


def test_an_interrupt(model: str) -> None:
    """While it waits for its prompt, say."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", WAITING, "generate", model], **pipes) as running:
        assert running.stdout is not None
        assert running.stdout.read(3) == b"up\n"
        running.send_signal(signal.SIGINT)
        assert running.wait(timeout=300) == 130
        assert running.stderr is not None
        assert running.stderr.read() == b"interrupted\n"
