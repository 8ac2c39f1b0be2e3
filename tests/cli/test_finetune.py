"""`mobilellm finetune` as a person uses it: a chat model that stops, the same command again, refusals."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import safetensors.numpy
import torch
from chat_data import records, tokenizer, written

from mobilellm.chat_template import DEFAULT, ChatTemplate
from mobilellm.cli import run_folder
from mobilellm.cli.main import _main
from mobilellm.data.chat import read_chat
from mobilellm.model import api, checkpoint
from mobilellm.model.generate import generate_tokens
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import PAD_ID
from mobilellm.train.loss import weighted_loss
from mobilellm.train.metrics import Record, read_metrics
from mobilellm.train.recipe import load_recipe

from .test_train import timeless

FLAGS = [
    "--batch.sequence-length", "96", "--batch.tokens-per-step", "384", "--batch.micro-batch", "2",
    "--evaluate-every", "4", "--checkpoint.every", "3", "--schedule.warmup-steps", "1",
    "--optim.lr", "5e-3", "--sample.prompts", "why not", "--sample.tokens", "4", "--device", "cpu",
    "--log.no-tensorboard",
]  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with a licence, and conversations of which some cannot be used."""
    return written_place(
        tmp_path_factory.mktemp("finetune"), {"text": "x"}, {"prompt": "a " * 400, "completion": "b"}
    )


def written_place(folder: Path, *further: dict[str, str]) -> Path:
    """The base model, and 60 conversations with `further` rows after them."""
    config = replace(preset("test-ls"), vocab_size=tokenizer().vocab_size)
    checkpoint.save(folder / "base", MobileLLM(config, torch.Generator().manual_seed(0)), tokenizer())
    (folder / "base" / "LICENSE").write_text("for research only")
    written(folder / "talks.jsonl", [*records(60), *further])
    return folder


def finetune(place: Path, out: Path, *flags: str) -> list[str]:
    base, talks = place / "base", place / "talks.jsonl"
    return ["finetune", str(base), "--chat.train", str(talks), "--out", str(out), *flags]


def command(place: Path, out: Path, *flags: str) -> list[str]:
    return finetune(place, out, *FLAGS, *flags)


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    assert _main(command(place, out)) == 0
    return out


def test_what_it_leaves(whole: Path, place: Path) -> None:
    model = whole / "model"
    assert (model / "chat_template.jinja").read_text() == DEFAULT
    generation = json.loads((model / "generation_config.json").read_text())
    assert generation["pad_token_id"] == PAD_ID != generation["eos_token_id"]
    assert (model / "LICENSE").read_text() == "for research only"
    assert api.load(model).chat_template == DEFAULT
    rejected = [json.loads(line) for line in (whole / "rejected.jsonl").read_text().splitlines()]
    reasons = [line["reason"] for line in rejected]
    assert reasons == ["too long"] * 8 + ["unknown shape", "too long"]
    assert [line["line"] for line in rejected[-2:]] == [61, 62]
    card = json.loads((whole / "run.json").read_text())
    assert card["evaluation"]["targets"] == "assistant"
    read = read_chat([place / "talks.jsonl"], ChatTemplate(DEFAULT, tokenizer()), 97)
    recipe = load_recipe(whole / "recipe.toml")
    assert recipe.epochs == 3
    assert recipe.steps == card["steps"] >= 3 * int(read.conversations.lengths.sum() * 0.8 / 384)
    (samples,) = {
        tuple(pair[0] for pair in record["samples"]) for record in timeless(whole) if "samples" in record
    }
    assert samples == ("why not",)


def test_it_learns_what_the_assistant_says(whole: Path) -> None:
    evaluations = [record["eval"] for record in read_metrics(whole / "metrics.jsonl") if "eval" in record]
    assert evaluations[-1]["loss"] < 0.8 * evaluations[0]["loss"]


def test_it_learns_to_stop(place: Path, tmp_path: Path) -> None:
    """Every answer is the same two words: soon the model says them and </s>."""
    rows = [{"prompt": row["messages"][0]["content"], "completion": "the sea"} for row in records(40)]
    file = written(tmp_path / "sea.jsonl", rows)
    flags = ["--chat.train", str(file), "--steps", "60", "--epochs", "0", "--optim.lr", "1e-2"]
    assert _main(command(place, tmp_path / "run", *flags, "--evaluate-every", "60")) == 0
    loaded = api.load(tmp_path / "run")
    assert loaded.chat_template is not None
    prompt = ChatTemplate(loaded.chat_template, tokenizer()).prompt(
        [{"role": "user", "content": "one river"}]
    )
    said = list(generate_tokens(loaded.model, [prompt], max_new_tokens=30))
    assert said[-1].finish == "eos"
    assert tokenizer().decode([new.token or 0 for new in said]) == "the sea"


def test_stopped_and_gone_on_with_it_is_the_same(
    whole: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kept = tmp_path / "run", run_folder.FolderFiles.__call__

    def stop_after_five(files: run_folder.FolderFiles, record: Record) -> None:
        kept(files, record)
        if record["step"] == 5 and "loss" in record:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(run_folder.FolderFiles, "__call__", stop_after_five)
        assert _main(command(place, out)) == 75
    assert len([record for record in read_metrics(out / "metrics.jsonl") if "loss" in record]) == 5
    assert _main(command(place, out, "--resume")) == 0
    assert timeless(out) == timeless(whole)
    ours, theirs = (safetensors.numpy.load_file(run / "model" / "model.safetensors") for run in (out, whole))
    assert all((ours[name] == theirs[name]).all() for name in theirs)


def test_other_conversations_are_not_gone_on_with(
    whole: Path, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    shutil.copytree(whole, tmp_path / "run")
    written(tmp_path / "other.jsonl", records(60, seed=9))
    flags = [
        "--chat.train",
        str(tmp_path / "other.jsonl"),
        "--steps",
        str(load_recipe(whole / "recipe.toml").steps),
    ]
    assert _main(command(place, tmp_path / "run", *flags, "--epochs", "0")) == 2
    assert "resume with the same files, template" in capsys.readouterr().err


def test_as_json_and_in_words(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(command(place, tmp_path / "a", "--steps", "2", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps"] == 2
    assert result["before"].keys() == {"loss", "perplexity"}
    assert _main(command(place, tmp_path / "b", "--steps", "2", "--chat.held-out-fraction", "0")) == 0
    said = capsys.readouterr().out
    assert "52 of 62 conversations; left out: 9 too long, 1 unknown shape" in said
    assert f"chat {tmp_path / 'b'}" in said
    assert not [record for record in read_metrics(tmp_path / "b" / "metrics.jsonl") if "eval" in record]


def test_planned(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(command(place, tmp_path / "a", "--plan", "--json")) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["steps"] == load_recipe_steps(place)
    assert plan["data"] == []
    assert not (tmp_path / "a").exists()


def load_recipe_steps(place: Path) -> int:
    import mobilellm.cli.finetune as verb
    from mobilellm.cli.conversation_text import ChatText
    from mobilellm.cli.finetune import default_arguments
    from mobilellm.cli.parse import parse
    from mobilellm.train.recipe import with_steps

    recipe = parse("finetune", verb, command(place, Path("x"))[1:]).settings
    assert default_arguments([str(place / "base")]).settings.model.init_from == place / "base"
    return with_steps(recipe, ChatText(recipe).sequences).steps


def test_a_template_of_ones_own_and_held_out_files(place: Path, tmp_path: Path) -> None:
    own = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]\n{{ m.content }}{{ eos_token }}{% endfor %}" \
          "{{ '[assistant]\n' if add_generation_prompt }}"  # fmt: skip
    (tmp_path / "own.jinja").write_text(own)
    held = written(tmp_path / "held.jsonl", records(8, seed=4))
    flags = ["--chat.template", str(tmp_path / "own.jinja"), "--chat.held-out", str(held), "--steps", "2"]
    assert _main(command(place, tmp_path / "run", *flags)) == 0
    assert api.load(tmp_path / "run").chat_template == own
    # A model that has a template keeps it.
    arguments = command(place, tmp_path / "again", "--steps", "1")
    arguments[1] = str(tmp_path / "run")
    assert _main(arguments) == 0
    assert api.load(tmp_path / "again").chat_template == own


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--chat.train", "absent.jsonl"], "absent.jsonl: no such file of conversations"),
        (["--chat.template", "absent.jinja"], "absent.jinja: no such chat template"),
        (["--chat.template", "BYTES"], "bytes.jinja: a chat template is UTF-8 text, this is none"),
        (["--chat.template", "BAD"], "it does not close the assistant's turn with eos_token"),
        (["--chat.over-long", "drop"], "--chat.over-long 'drop' must be skip or truncate"),
        (["--batch.sequence-length", "3", "--batch.tokens-per-step", "12"], "no conversation to learn from"),
        (["--batch.tokens-per-step", "9600"], "give more of them, or make --batch.tokens-per-step "),
        (["--data.train", "shards"], "data and chat exclude each other"),
        (["--recipe", "tiny-cpu"], "recipe tiny-cpu trains on shards"),
        (["--chat.held-out-fraction", "0.9999"], "conversations would be held out"),
        (["--chat.held-out", "absent.jsonl"], "absent.jsonl: no such file of conversations"),
        (["--sample.prompts", "why " * 200], "--sample.prompts: prompt 0 has "),
        (["--log.tracker", "trackio"], "--log.tracker 'trackio' is not installed"),
        (["--out", "IN_USE"], "holds something else than a training run"),
        (["--resume"], "has no checkpoint to go on from"),
        (["--device", "tpu"], "choose cpu or cuda"),
    ],
)
def test_refusals(
    place: Path, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "--log.tracker" in flags and find_spec("trackio") is not None:
        pytest.skip("it is installed here")
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}")
    (tmp_path / "bytes.jinja").write_bytes(b"\xff{{ messages }}")
    files = {
        "BAD": str(tmp_path / "bad.jinja"),
        "BYTES": str(tmp_path / "bytes.jinja"),
        "IN_USE": str(place / "base"),
    }
    flags = [files.get(flag, flag) for flag in flags]
    lines = []
    for further in ([], ["--plan"]):  # a plan refuses what the run would
        assert _main(command(place, tmp_path / "run", *flags, *further)) == 2
        lines.append(capsys.readouterr().err)
        assert words in lines[-1]
        assert lines[-1].count("\n") == 1
    assert lines[0] == lines[1]
    assert not (tmp_path / "run" / "model").exists()


def test_no_more_is_evaluated_than_was_asked_for(place: Path) -> None:
    """Sequences of 96 tokens within 1,000: ten, though they are evaluated eight at a time."""
    import mobilellm.cli.finetune as verb
    from mobilellm.cli.conversation_text import ChatText
    from mobilellm.cli.parse import parse
    from mobilellm.train.distributed import World

    def loss(rows: int, *flags: str) -> float:
        held = ["--chat.held-out", str(place / "talks.jsonl"), "--chat.no-packing"]
        recipe = parse("finetune", verb, command(place, Path("x"), *held, *flags)[1:]).settings
        text = ChatText(recipe)
        assert text._held_out_rows is not None
        evaluate = text.evaluator(World())
        assert evaluate is not None
        model = api.load(place / "base").model
        batch = text._held_out_rows.batch(0, rows)
        tensors = [torch.from_numpy(part) for part in batch if part is not None]
        with torch.no_grad():
            nats = weighted_loss(model, *tensors[:3], segments=tensors[3]).item()
        assert evaluate(model, 0)["loss"] == pytest.approx(nats / batch.weights.sum(), rel=1e-5)
        return nats

    loss(10, "--chat.held-out-tokens", "1000")
    loss(1, "--chat.held-out-tokens", "5")  # at least one


def test_a_model_is_named_first(capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["finetune", "--chat.train", "x"]) == 2
    assert "name a model first" in capsys.readouterr().err
    assert _main(["finetune", "--help"]) == 0
    assert "--chat.train" in capsys.readouterr().out


def test_a_chat_model_gets_used_to_few_bits(place: Path, tmp_path: Path) -> None:
    """[qat] beside [chat]: evaluations are of the quantised model, which keeps template and licence."""
    out = tmp_path / "run"
    assert _main(command(place, out, "--qat.scheme", "q4_0", "--steps", "4")) == 0
    assert (out / "quantized" / "chat_template.jinja").read_text() == DEFAULT
    assert (out / "quantized" / "LICENSE").read_text() == "for research only"
    with (out / "quantized" / "quantization.json").open() as file:
        assert json.load(file)["scheme"] == "q4_0"
    evaluations = [each["eval"]["loss"] for each in read_metrics(out / "metrics.jsonl") if "eval" in each]
    assert evaluations[-1] < evaluations[0]
