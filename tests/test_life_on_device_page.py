"""docs/life-on-device.md: its commands, in their order, on a model of 0.2M parameters; in every format it answers alike and stops."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from mobilellm.cli.main import _main
from mobilellm.config import ModelConfig
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.tokenizer import Tokenizer

pytestmark = pytest.mark.slow  # a model is trained

_PAGE = (Path(__file__).parents[1] / "docs" / "life-on-device.md").read_text("utf-8")
COLOURS = {
    "sky": "blue", "grass": "green", "snow": "white", "coal": "black", "blood": "red", "sun": "yellow",
    "sea": "deep blue", "rose": "pink",
}  # fmt: skip
QUESTIONS = [f"What colour is the {thing}?" for thing in COLOURS]
NEEDED = {"--to onnx": "onnxruntime_genai", "--to executorch": "executorch"}
SMALLER = {  # the same commands, in steps of few tokens
    " --out runs/": (
        " --batch.tokens-per-step 512 --batch.micro-batch 4 --batch.sequence-length 128"
        " --chat.held-out-fraction 0 --device cpu --out runs/"
    ),
    "--chat.train conversations.jsonl": "--chat.train conversations.jsonl --epochs 60 --optim.lr 3e-3",
    "--chat.train more.jsonl": "--chat.train more.jsonl --epochs 2 --optim.lr 1e-4",
    "chat-q4 --scheme": "chat-q4 --eval-tokens 0 --scheme",
    "--message": "--temperature 0 --max-tokens 60 --message",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which all commands of the page have been run."""
    folder = tmp_path_factory.mktemp("life")
    with chdir(folder):
        talks = [_talk(thing, colour, number) for thing, colour in COLOURS.items() for number in range(3)]
        lines = "".join(json.dumps({"messages": talk}) + "\n" for talk in talks)
        Path("conversations.jsonl").write_text(lines, "utf-8")
        Path("more.jsonl").write_text(lines, "utf-8")
        _base_model(Path("my-model"), [message["content"] for talk in talks for message in talk])
        for line in _commands():
            assert _main(shlex.split(line)[1:]) == 0, line
        yield folder


def _talk(thing: str, colour: str, number: int) -> list[dict[str, str]]:
    question, answer = (
        (f"What colour is the {thing}?", f"The {thing} is {colour}."),
        (f"Is the {thing} {colour}?", "Yes, it is."),
        (f"Name the colour of the {thing}.", f"It is {colour}."),
    )[number]
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _base_model(directory: Path, texts: list[str]) -> None:
    config = ModelConfig(
        vocab_size=380, hidden_size=64, intermediate_size=160, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=16, max_position_embeddings=256,
    )  # fmt: skip
    tokenizer = Tokenizer.train(texts * 4 + ["system\nuser\nassistant\n"] * 20, config.vocab_size)
    checkpoint.save(directory, MobileLLM(config, torch.Generator().manual_seed(0)), tokenizer)


def _commands() -> Iterator[str]:
    blocks = re.findall(r"```console\n(.*?)```", _PAGE, flags=re.DOTALL)
    for line in "".join(blocks).splitlines():
        if any(option in line and find_spec(package) is None for option, package in NEEDED.items()):
            continue
        for published, smaller in SMALLER.items():
            line = line.replace(published, smaller)  # noqa: PLW2901
        yield line


def answers(capsys: pytest.CaptureFixture[str], model: str) -> list[tuple[str, str]]:
    """(text, how it ended) of the greedy answer to every question, each in a conversation of its own."""
    capsys.readouterr()
    found = []
    for question in QUESTIONS:
        assert (
            _main(
                ["chat", model, "--temperature", "0", "--max-tokens", "60", "--json", "--message", question]
            )
            == 0
        )
        said: dict[str, Any] = json.loads(capsys.readouterr().out)
        found.append((said["message"]["content"], said["finish"]))
    return found


@pytest.fixture(scope="module")
def wanted(place: Path) -> list[tuple[str, str]]:
    """The answers of the merged model in PyTorch."""
    import contextlib
    import io

    found = []
    for question in QUESTIONS:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            command = [
                "chat",
                str(place / "chat-model"),
                "--temperature",
                "0",
                "--max-tokens",
                "60",
                "--json",
            ]
            assert _main([*command, "--message", question]) == 0
        said = json.loads(out.getvalue())
        found.append((said["message"]["content"], said["finish"]))
    return found


def test_it_learnt_to_stop(wanted: list[tuple[str, str]]) -> None:
    assert {finish for _, finish in wanted} == {"eos"}
    right = sum(f"is {colour}." in text for (text, _), colour in zip(wanted, COLOURS.values(), strict=True))
    assert (
        right >= 6
    )  # of 8: it has learnt what it was told, or the answers below would be alike for no reason


@pytest.mark.parametrize("model", ["chat-f16.gguf", "chat-ollama.gguf", "chat-hf", "chat-onnx", "chat-pte"])
def test_the_same_answers_in_every_format(
    model: str, place: Path, wanted: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    if not (place / model).exists():
        pytest.skip("its toolchain is not installed")
    assert answers(capsys, str(place / model)) == wanted


@pytest.mark.parametrize("model", ["chat-q4", "chat.gguf"])
def test_four_bits_stop_too(
    model: str, place: Path, wanted: list[tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = answers(capsys, str(place / model))
    assert {finish for _, finish in found} == {"eos"}
    assert sum(a == b for a, b in zip(found, wanted, strict=True)) >= len(wanted) // 2


def test_the_page_in_stock_transformers(place: Path, wanted: list[tuple[str, str]]) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", _PAGE, flags=re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-I", "-c", program],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout == f"{wanted[0][0]}\n"


def test_llama_cpp_completes_the_chat(place: Path, wanted: list[tuple[str, str]]) -> None:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python (extra peers)")
    model = llama_cpp.Llama(str(place / "chat-f16.gguf"), n_ctx=0, verbose=False)
    for question, (text, _) in zip(QUESTIONS, wanted, strict=True):
        told = [{"role": "user", "content": question}]
        done = model.create_chat_completion(messages=told, temperature=0.0, max_tokens=60, repeat_penalty=1.0)
        assert done["choices"][0]["finish_reason"] == "stop"
        assert done["choices"][0]["message"]["content"].strip() == text
    model.close()


def test_onnxruntime_genai_generates_it(place: Path, wanted: list[tuple[str, str]]) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="needs the extra onnx")
    model = genai.Model(str(place / "chat-onnx"))
    tokenizer = genai.Tokenizer(model)
    for question, (text, _) in zip(QUESTIONS, wanted, strict=True):
        told = json.dumps([{"role": "user", "content": question}])
        prompt = tokenizer.encode(tokenizer.apply_chat_template(told, add_generation_prompt=True))
        settings = genai.GeneratorParams(model)
        settings.set_search_options(max_length=len(prompt) + 60, do_sample=False)
        generator = genai.Generator(model, settings)
        generator.append_tokens(prompt)
        while not generator.is_done():
            generator.generate_next_token()
        new = list(generator.get_sequence(0))[len(prompt) :]
        assert new[-1] == 2
        assert tokenizer.decode(new[:-1]).strip() == text


def test_what_names_the_end(place: Path) -> None:
    modelfile = (place / "chat-ollama.Modelfile").read_text("utf-8")
    assert 'PARAMETER stop "</s>"' in modelfile
    assert '{{ if eq .Role "system" }}system\n{{ .Content }}</s>' in modelfile
    assert modelfile.count("<s>") == 0  # Ollama puts it there itself
    described = json.loads((place / "chat-hf" / "generation_config.json").read_text("utf-8"))
    assert (described["bos_token_id"], described["eos_token_id"], described["pad_token_id"]) == (1, 2, 0)
