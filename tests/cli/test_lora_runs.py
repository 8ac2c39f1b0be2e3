"""[lora] as a person uses it: finetune, go on, merge, generate; what cannot be is refused in one line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra finetune")

from chat_data import tokenizer

from mobilellm.chat_template import DEFAULT
from mobilellm.cli.main import _main
from mobilellm.model import api, checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.train.lora import LoraChoice, adapter_parameters
from mobilellm.train.metrics import read_metrics

from .refusals import refusal
from .test_finetune import finetune, written_place
from .test_train import timeless

FLAGS = [
    "--batch.sequence-length", "96", "--batch.tokens-per-step", "384", "--batch.micro-batch", "2",
    "--evaluate-every", "2", "--checkpoint.every", "2", "--schedule.warmup-steps", "1", "--steps", "4",
    "--optim.lr", "2e-2", "--sample.prompts", "why not", "--sample.tokens", "4", "--device", "cpu",
    "--log.no-tensorboard", "--lora.rank", "4",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written_place(tmp_path_factory.mktemp("lora"))


def command(place: Path, out: Path, *flags: str) -> list[str]:
    return finetune(place, out, *FLAGS, *flags)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert _main(command(place, out)) == 0
    return out


def test_what_it_leaves(whole: Path, place: Path) -> None:
    assert sorted(path.name for path in (whole / "adapter").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "special_tokens_map.json",
        "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    assert not (whole / "model").exists()
    config = json.loads((whole / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (4, str(place / "base"))
    card = json.loads((whole / "run.json").read_text())
    shape = replace(preset("test-ls"), vocab_size=tokenizer().vocab_size)
    assert card["trained_parameters"] == adapter_parameters(LoraChoice(rank=4), shape)
    assert "[lora]\nrank = 4\n" in (whole / "recipe.toml").read_text()


def test_evaluations_are_of_the_merged_model(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before the first step of the base; they fall; the same for what is loaded, but for rounded weights."""
    losses = [record["eval"]["loss"] for record in read_metrics(whole / "metrics.jsonl") if "eval" in record]
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("kind", [["--lora.dropout", "0.1"], ["--lora.dropout", "0.1", "--lora.dora"]])
def test_going_on_is_exact(kind: list[str], place: Path, tmp_path: Path) -> None:
    """From the checkpoint of step 2, as after a kill."""
    out = tmp_path / "run"
    assert _main(command(place, out, *kind)) == 0
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "step-00000002").rename(other / "checkpoints" / "step-00000002")
    (other / "metrics.jsonl").write_bytes((out / "metrics.jsonl").read_bytes())
    assert _main(command(place, other, *kind, "--resume")) == 0
    assert timeless(other) == timeless(out)
    ours, theirs = (api.load(each, say=print).model.state_dict() for each in (out, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_merge_writes_a_model_like_any_other(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "merged"
    assert _main(["merge", str(whole), "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["chat_template"] is True
    assert (out / "chat_template.jinja").read_text() == DEFAULT
    assert (out / "LICENSE").read_text() == "for research only"
    merged, adapted = api.load(out), api.load(whole, say=print)
    assert merged.chat_template == adapted.chat_template == DEFAULT
    for name, tensor in adapted.model.state_dict().items():
        assert torch.equal(merged.model.state_dict()[name], tensor)
    texts = []
    for model in (out, whole):
        assert _main(["generate", str(model), "one", "--max-tokens", "5", "--json"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["completions"][0]["text"])
    assert texts[0] == texts[1]
    assert _main(["merge", str(out), "--out", str(tmp_path / "again")]) == 2
    assert "is a whole model already; there is nothing to merge" in capsys.readouterr().err
    assert _main(["merge", str(whole), "--out", str(out)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert _main(["merge", str(whole), "--out", str(out), "--overwrite", "--dtype", "bfloat16"]) == 0
    assert api.load(out).model.head_weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--lora.rank", "0"], "--lora.rank 0 must be at least 1"),
        (["--lora.dropout", "1.0"], "--lora.dropout 1.0 must be 0 or above, below 1"),
        (["--lora.alpha", "0"], "must be above 0"),
        (["--lora.targets", "q_proj", "c_attn"], "--lora.targets q_proj c_attn must name matrices"),
        (["--optim.name", "muon"], "is for whole matrices, not for lora; use 'adamw'"),
        (["--compute.strategy", "fsdp"], "does not go with lora"),
        # Its base would not have it: merged, the model would end where the base does.
        (["--model.max-position-embeddings", "256"], "(max_position_embeddings = 128 there, 256 here)"),
    ],
)
def test_refusals(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    for further in ([], ["--plan"]):
        assert _main(command(place, tmp_path / "run", *flags, *further)) == 2
        said = capsys.readouterr().err  # what was read before may stand on standard output
        assert words in said
        assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_other_refusals(whole: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    config = replace(preset("test-ls"), vocab_size=tokenizer().vocab_size)
    checkpoint.save(other, MobileLLM(config, torch.Generator().manual_seed(1)), tokenizer())
    for arguments, words in (
        (["merge", str(whole), "--model", str(other), "--out", str(tmp_path / "x")], "on other weights than"),
        (["export", str(whole), str(tmp_path / "x.gguf"), "--to", "gguf"], "mobilellm merge"),
        (["finetune", str(whole), *command(place, tmp_path / "y")[2:]], "mobilellm merge"),
        (["merge", str(place), "--out", str(tmp_path / "x")], "no adapter_config.json there"),
    ):
        assert words in refusal(capsys, *arguments)


def test_a_plan_counts_adapters(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plans = []
    for flags in ([], ["--lora.rank", "2"]):
        assert _main([*command(place, tmp_path / "run")[:-2], "--plan", "--json", *flags]) == 0
        plans.append(json.loads(capsys.readouterr().out))
    full, lora = plans
    shape = replace(preset("test-ls"), vocab_size=tokenizer().vocab_size)
    count = adapter_parameters(LoraChoice(rank=2), shape)
    assert full["trained_parameters"] == full["parameters"]["total"]
    assert lora["trained_parameters"] == count
    assert (lora["memory"]["gradients"], lora["memory"]["optimizer"]) == (4 * count, 8 * count)
    assert lora["memory"]["weights"] < 0.7 * full["memory"]["weights"]
    assert lora["flops_per_token"] < full["flops_per_token"]
    assert _main([*command(place, tmp_path / "run"), "--plan"]) == 0
    assert "of adapters trained" in capsys.readouterr().out
