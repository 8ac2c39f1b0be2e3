"""`mobilellm train` with a teacher, on shards and on conversations, as a person uses it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.numpy
import torch

from mobilellm.cli.main import _main
from mobilellm.data.documents import paragraphs, text_files
from mobilellm.data.shards import write_shards
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.metrics import read_metrics
from mobilellm.train.recipe import load_recipe

from .test_train import refused, refused_as_planned

RECIPE = """
steps = 6
evaluate_every = 6
[model]
preset = "test-ls"
[data]
train = ["to be named"]
[batch]
tokens_per_step = 256
sequence_length = 64
micro_batch = 4
[optim]
lr = 1e-2
[schedule]
warmup_steps = 2
[compute]
precision = "float32"
[checkpoint]
every = 2
"""
DISTILL = ("--distill.top-k", "16", "--distill.temperature", "2")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    """A recipe, shards, conversations, a teacher, and one with another tokenizer."""
    folder = tmp_path_factory.mktemp("distil")
    documents = [part for document in text_files([small_text]) for part in paragraphs(document, 1000)]
    texts = [document.text for document in documents]
    for name, vocab_size in (("shards", 384), ("other-shards", 360)):
        tokenizer = Tokenizer.train(iter(texts), vocab_size)
        write_shards(folder / name, documents[:60], tokenizer, "the documentation of Python", "PSF", 0.1)
        tokenizer.save(folder / name / "tokenizer")
    (folder / "tiny.toml").write_text(RECIPE)
    chat = RECIPE.replace("[data]", 'init_from = "teacher"\n[chat]').replace("steps = 6", "steps = 12")
    (folder / "chat.toml").write_text(chat.replace("test-ls", "test"))
    for name, shards in (("teacher", "shards"), ("stranger", "other-shards")):
        tokenizer = Tokenizer.load(folder / shards / "tokenizer")
        config = replace(preset("test"), vocab_size=tokenizer.vocab_size, initializer_range=0.1)
        checkpoint.save(folder / name, MobileLLM(config, torch.Generator().manual_seed(1)), tokenizer)
    with (folder / "chat.jsonl").open("w") as file:
        for text in texts[:60]:
            turns = [("user", text[:20]), ("assistant", text[20:60])]
            messages = [{"role": role, "content": content} for role, content in turns]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder


def command(
    place: Path, out: Path, *flags: str, teacher: str | None = "teacher", recipe: str = "tiny"
) -> list[str]:
    named = ["--distill.teacher", str(place / teacher)] if teacher else []
    data = ["--data.train", str(place / "shards")] if recipe == "tiny" else []
    cache = [] if "--distill.cache" in flags else ["--distill.cache", str(out.parent / "cache")]
    return [
        "train",
        str(place / f"{recipe}.toml"),
        *data,
        *named,
        *cache,
        *DISTILL,
        "--out",
        str(out),
        *flags,
    ]


def weights(out: Path) -> dict[str, Any]:
    return safetensors.numpy.load_file(out / "model" / "model.safetensors")


def same_model(a: Path, b: Path) -> bool:
    ours, theirs = weights(a), weights(b)
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def test_a_run_says_what_the_teacher_did_and_later_ones_need_it_no_more(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert _main(command(place, tmp_path / "a")) == 0
    assert "distillation: the teacher ran over 24 passages; 24 are in" in capsys.readouterr().out
    kept = load_recipe(tmp_path / "a" / "recipe.toml").distill
    assert kept is not None
    assert (kept.top_k, kept.temperature) == (16, 2.0)
    assert _main(command(place, tmp_path / "b", teacher=None)) == 0
    assert "distillation: the teacher need not run; 24 are in" in capsys.readouterr().out
    assert same_model(tmp_path / "a", tmp_path / "b")
    plain = ["train", str(place / "tiny.toml"), "--data.train", str(place / "shards")]
    assert _main([*plain, "--out", str(tmp_path / "plain")]) == 0
    assert not same_model(tmp_path / "a", tmp_path / "plain")


def planned(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert _main([*arguments, "--plan", "--json"]) == 0
    plan: dict[str, Any] = json.loads(capsys.readouterr().out)
    return plan


def test_a_plan_counts_the_teacher(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it has to run over, in the end: nothing is made, and the run then does just that."""
    run = command(place, tmp_path / "run")
    plan = planned(capsys, run)
    before = plan["teaching"]
    assert before["teacher"] == str(place / "teacher")
    assert (before["passages"], before["tokens"], before["at_most"]) == (24, 24 * 64, False)
    assert before["flops"] > 24 * 64 * before["parameters"]
    assert before["memory_bytes"] > 4 * before["parameters"]
    assert list(tmp_path.iterdir()) == []
    assert _main([*run, "--plan"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "runs first, over 24 passages of 1,536 tokens in all" in said
    assert "before: teacher, weights" in said
    assert _main(run) == 0
    written = sum(file.stat().st_size for file in (tmp_path / "cache").glob("part-*"))
    assert before["cache_bytes_added"] == pytest.approx(written, rel=0.05)
    for teacher in ("teacher", None):  # its cache holds everything: with it, without it
        after = planned(capsys, command(place, tmp_path / "again", teacher=teacher))
        assert after["flops"] == plan["flops"]
        assert (after["teaching"]["passages"], after["teaching"]["flops"]) == (0, 0)
        assert after["teaching"]["cache_passages"] == 24
        assert after["paces"][1]["days"] < plan["paces"][1]["days"]
    assert after["teaching"]["memory_bytes"] == 0
    longer = planned(capsys, command(place, tmp_path / "again", "--steps", "9"))["teaching"]
    assert 0 < longer["passages"] <= 12


def test_a_plan_before_there_are_data(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = ["--data.train", str(tmp_path / "absent")]
    before = planned(capsys, command(place, tmp_path / "run", *absent, "--model.vocab-size", "384"))[
        "teaching"
    ]
    assert (before["passages"], before["at_most"]) == (24, True)
    assert "no such directory" in refused(
        capsys, [*command(place, tmp_path / "run", *absent, teacher="nowhere/at/all"), "--plan"]
    )


def test_a_stopped_run_goes_on_exactly(place: Path, tmp_path: Path) -> None:
    assert _main(command(place, tmp_path / "whole")) == 0
    assert _main(command(place, tmp_path / "run")) == 0
    (newest,) = (tmp_path / "run" / "checkpoints").glob("step-*6")
    shutil.rmtree(newest)
    shutil.rmtree(tmp_path / "run" / "model")
    assert _main(command(place, tmp_path / "run", "--resume")) == 0
    assert same_model(tmp_path / "whole", tmp_path / "run")


def test_conversations_are_found_however_epochs_pack_them(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--chat.train", str(place / "chat.jsonl"), "--model.init-from", str(place / "teacher")]
    capsys.readouterr()
    assert _main(command(place, tmp_path / "run", *flags, recipe="chat")) == 0
    said = capsys.readouterr().out
    loader_saw = int(said.split("the teacher ran over ")[1].split()[0])
    assert 40 <= loader_saw <= 60  # conversations, seen more than once each
    losses = [
        record["loss"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in record
    ]
    assert losses[-1] < losses[0]


def test_what_cannot_be_is_refused_in_one_line(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*flags: str, teacher: str | None = "teacher") -> str:
        return refused_as_planned(capsys, command(place, tmp_path / "run", *flags, teacher=teacher))

    assert "has another tokenizer than the data (360 tokens there, 384 here)" in told(teacher="stranger")
    assert "no teacher's cache there; name the teacher (--distill.teacher)" in told(teacher=None)
    assert "--distill.top-k 385 is more than the teacher's vocabulary of 384" in told(
        "--distill.top-k", "385"
    )
    assert "--distill.temperature 0.0 must be above 0" in told("--distill.temperature", "0")
    assert "--distill.temperature -1.0 must be above 0" in told("--distill.temperature", "-1")
    assert "--distill.kl-weight 0.0 must be above 0" in told("--distill.kl-weight", "0")
    assert "--distill.ce-weight -1.0 must be 0 or above" in told("--distill.ce-weight", "-1")
    assert "--distill.top-k 0 must be above 0" in told("--distill.top-k", "0")
    assert "--distill.dtype 'int8' must be float32 or bfloat16" in told("--distill.dtype", "int8")
    assert "no such directory" in told(teacher="nowhere/at/all")
    assert "'q5_k' is not known" in told(
        "--qat.scheme", "q5_k", "--distill.cache", str(tmp_path / "unfilled")
    )
    assert not (tmp_path / "unfilled").exists()  # a teacher may take hours: it runs last
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_a_cache_of_something_else_is_refused(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(command(place, tmp_path / "run", "--json")) == 0
    other = tmp_path / "other"

    def told(*flags: str, teacher: str | None = "teacher") -> str:
        return refused_as_planned(capsys, command(place, other, *flags, teacher=teacher))

    assert "is another teacher's cache (--distill.top-k 16 there, 8 here)" in told("--distill.top-k", "8")
    assert "is another teacher's cache (teacher = " in told("--distill.teacher", str(tmp_path / "run"))
    assert "was made with --distill.temperature 2.0; ask for that" in told(
        "--distill.temperature", "3", teacher=None
    )
    more = told("--batch.tokens-per-step", "128", "--batch.sequence-length", "32", teacher=None)
    assert "passages of this run" in more
    part = next((tmp_path / "cache").glob("part-*"))
    content = part.read_bytes()
    part.write_bytes(content[: len(content) // 2])
    assert f"{part}: damaged" in told()
    part.unlink()
    assert _main(command(place, other)) == 0
    assert same_model(other, tmp_path / "run")


def test_a_teacher_and_few_bits_go_together(place: Path, tmp_path: Path) -> None:
    """[qat] beside [distill]: the student is taught with the weights that are exported."""
    flags = ["--qat.scheme", "q4_0", "--steps", "2", "--compute.precision", "bfloat16"]
    losses = []
    for bits in (flags[2:], flags):
        out = tmp_path / f"run{len(bits)}"
        assert _main(command(place, out, *DISTILL, *bits)) == 0
        losses.append([each["loss"] for each in read_metrics(out / "metrics.jsonl") if "loss" in each])
    assert (out / "quantized").is_dir()
    assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.05)
