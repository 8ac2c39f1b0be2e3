"""`mobilellm train` as a person uses it: a run, the same command again, stops, refusals, many processes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from mobilellm.cli import run_parts
from mobilellm.cli.main import _main
from mobilellm.data.documents import paragraphs, text_files
from mobilellm.data.shards import read_index, read_split, write_index, write_shards
from mobilellm.eval.perplexity import windowed
from mobilellm.model.api import load
from mobilellm.model.transformer import Block
from mobilellm.report.progress import TrainingProgress
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.device import name_of
from mobilellm.train.metrics import Record, read_metrics
from mobilellm.train.recipe import load_recipe

STEPS = 6
RECIPE = f"""
steps = {STEPS}
evaluate_every = 3

[model]
preset = "test"

[data]
train = ["to be named"]
held_out_tokens = 3000

[batch]
tokens_per_step = 256
sequence_length = 32
micro_batch = 4

[optim]
lr = 1e-2

[schedule]
warmup_steps = 2

[compute]
precision = "float32"

[checkpoint]
every = 2

[sample]
prompts = ["Return a"]
tokens = 5
"""


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> Path:
    return written_place(tmp_path_factory.mktemp("train"), small_text)


def written_place(folder: Path, small_text: Path) -> Path:
    """A recipe, and three folders of shards: two of one tokenizer, one of another."""
    documents = [part for document in text_files([small_text]) for part in paragraphs(document, 1000)]
    texts = [document.text for document in documents]
    for name, part, vocab_size in (
        ("one", documents[:120], 384), ("two", documents[120:], 384), ("other", documents[:120], 360),
    ):  # fmt: skip
        tokenizer = Tokenizer.train(iter(texts), vocab_size)
        write_shards(folder / name, part, tokenizer, "the documentation of Python", "PSF", 0.1)
        tokenizer.save(folder / name / "tokenizer")
    (folder / "tiny.toml").write_text(RECIPE)
    return folder


def command(place: Path, out: Path, *flags: str, data: str = "one") -> list[str]:
    return ["train", str(place / "tiny.toml"), "--data.train", str(place / data), "--out", str(out), *flags]


def process(arguments: list[str], *launcher: str) -> list[str]:
    return [sys.executable, "-m", *launcher, "mobilellm", *arguments, "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "run"
    assert _main(command(place, out)) == 0
    return out


def same_model(a: Path, b: Path) -> bool:
    """Bit for bit."""
    ours, theirs = (safetensors.numpy.load_file(path / "model" / "model.safetensors") for path in (a, b))
    return ours.keys() == theirs.keys() and all((ours[name] == theirs[name]).all() for name in ours)


def timeless(out: Path) -> list[Record]:
    differing = {"seconds", "data_seconds", "peak_memory_bytes"}
    records = read_metrics(out / "metrics.jsonl")
    return [{name: value for name, value in record.items() if name not in differing} for record in records]


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Exit code 2 and one line, which is returned."""
    capsys.readouterr()
    assert _main(arguments) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.out
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("mobilellm: error: ")
    return captured.err.removeprefix("mobilellm: error: ").strip()


def refused_as_planned(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """A plan of it is refused in the same words."""
    said = refused(capsys, arguments)
    assert refused(capsys, [*arguments, "--plan"]) == said
    return said


# A run


@pytest.mark.parametrize("typed", [["RUN"], ["RUN/", "--steps", "9"], ["--resume", "RUN"]])
def test_a_run_in_place_of_its_recipe(
    typed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("my run").mkdir()
    Path("my run/recipe.toml").write_text(RECIPE)
    said = refused(capsys, ["train", *(word.replace("RUN", "my run") for word in typed)])
    assert "my run" in said.partition(": is a run; it goes on with: ")[0]
    assert said.endswith(" train 'my run'/recipe.toml --out 'my run'")


def test_what_a_run_leaves(place: Path, whole: Path) -> None:
    assert sorted(path.name for path in whole.iterdir()) == [
        "checkpoints", "metrics.jsonl", "model", "recipe.toml", "run.json", "tensorboard",
    ]  # fmt: skip
    records = read_metrics(whole / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.3
    evaluations = [(record["step"], record["eval"]) for record in records if "eval" in record]
    assert [step for step, _ in evaluations] == [0, 3, 6]
    assert evaluations[-1][1]["bits_per_byte"] < 0.95 * evaluations[0][1]["bits_per_byte"]
    samples = [record["samples"] for record in records if "samples" in record]
    assert len(samples) == 3
    assert all(len(said) == 1 and said[0][0] == "Return a" and said[0][1] for said in samples)
    kept = load_recipe(whole / "recipe.toml")
    assert kept.data.train == (place / "one",)
    assert kept.steps == STEPS
    card = json.loads((whole / "run.json").read_text())
    assert (card["name"], card["steps"], card["world_size"], card["tokens_per_step"]) == (
        "run",
        STEPS,
        1,
        256,
    )
    assert card["parameters"] == sum(weight.size for weight in weights(whole).values())


def test_every_start_is_listed(
    place: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On what, from which step and by which version; run.json's own device is that of the last."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "update", stop_at(3, signal.SIGTERM))
        assert _main(command(place, out)) == 75
    first = json.loads((out / "run.json").read_text())
    (start,) = first["starts"]
    assert {name: start[name] for name in start if name not in ("step", "peak_flops")} == {
        name: first[name] for name in ("started", "device", "world_size", "commit", "versions")
    }
    assert (start["step"], start["world_size"], start["peak_flops"]) == (0, 1, None)
    assert start["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(run_parts, "card", elsewhere(run_parts.card))
    assert _main(command(place, out)) == 0
    then = json.loads((out / "run.json").read_text())
    assert [(each["step"], each["device"]) for each in then["starts"]] == [
        (0, start["device"]),
        (3, "an abacus"),
    ]
    assert (then["device"], then["started"]) == ("an abacus", first["started"])
    # A run that was stopped by an older version goes on with what is known of its first start.
    del first["starts"], first["commit"]
    (out / "run.json").write_text(json.dumps(first))
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    assert _main(command(place, out)) == 0
    old, new = json.loads((out / "run.json").read_text())["starts"]
    assert (old["step"], old["device"], "commit" in old) == (0, first["device"], False)
    assert new["step"] == 4


def elsewhere(card: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    return lambda *arguments: card(*arguments) | {"device": "an abacus"}


def weights(out: Path) -> dict[str, Any]:
    return safetensors.numpy.load_file(out / "model" / "model.safetensors")


def test_the_numbers_are_those_of_the_model(place: Path, whole: Path) -> None:
    """The last evaluation, again, of the model that was kept."""
    loaded = load(whole / "model")
    assert loaded.tokenizer is not None
    stream = read_split(place / "one", "held-out", loaded.tokenizer)[:3000]
    result = windowed(loaded.model.float(), stream, 32)
    told = read_metrics(whole / "metrics.jsonl")
    last = next(record["eval"] for record in reversed(told) if "eval" in record)
    assert last["loss"] == pytest.approx(result.loss, rel=1e-5)
    assert last["perplexity"] == pytest.approx(result.perplexity, rel=1e-4)
    size = sum(len(part.encode()) for part in decoded(loaded.tokenizer, stream.tolist()))
    assert last["bits_per_byte"] == pytest.approx(result.bits_per_byte(size), rel=1e-3)


@pytest.mark.parametrize("mask", [False, True])
def test_in_bfloat16_too(place: Path, tmp_path: Path, mask: bool) -> None:
    """A run that computes in bfloat16 reports what its model, saved in float32, is found to have, and says how."""
    out = tmp_path / "run"
    flags = ["--compute.precision", "bfloat16", "--steps", "30", *(["--data.document-mask"] if mask else [])]
    assert _main(command(place, out, *flags)) == 0
    loaded = load(out / "model")
    assert loaded.tokenizer is not None
    stream = read_split(place / "one", "held-out", loaded.tokenizer)[:3000]
    told = next(r["eval"] for r in reversed(read_metrics(out / "metrics.jsonl")) if "eval" in r)
    result = windowed(loaded.model.float(), stream, 32, document_mask=mask)
    assert told["loss"] == pytest.approx(result.loss, rel=1e-6)
    assert abs(windowed(loaded.model, stream, 32, document_mask=not mask).loss / told["loss"] - 1) > 1e-4
    assert json.loads((out / "run.json").read_text())["evaluation"] == {
        "window": 32, "document_mask": mask, "precision": "float32", "most_tokens": 3000,
    }  # fmt: skip


def decoded(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """The text of each document; the last may be cut in the middle of a character."""
    parts: list[list[int]] = []
    for token in ids:
        if token == 1:
            parts.append([])
        elif token != 2:
            parts[-1].append(token)
    return [tokenizer.decode(part) for part in parts]


def test_tensorboard_says_the_same(whole: Path) -> None:
    from tensorboardX.proto.event_pb2 import Event

    (file,) = (whole / "tensorboard").iterdir()
    content, scalars = file.read_bytes(), dict[tuple[str, int], float]()
    while content:  # records of TensorFlow: length, its checksum, bytes, their checksum
        (length,) = struct.unpack("<Q", content[:8])
        event = Event.FromString(content[12 : 12 + length])
        for value in event.summary.value:
            if value.HasField("simple_value"):
                scalars[value.tag, event.step] = value.simple_value
        content = content[16 + length :]
    wanted = {}
    for record in read_metrics(whole / "metrics.jsonl"):
        if "loss" in record:
            wanted |= {(f"train/{name}", record["step"]): record[name] for name in ("loss", "learning_rate")}
        wanted |= {(f"eval/{name}", record["step"]): value for name, value in record.get("eval", {}).items()}
    assert len(wanted) == 2 * STEPS + 3 * 3
    assert {key: scalars[key] for key in wanted} == pytest.approx(wanted, rel=1e-6)


def test_a_tracker_is_told_the_recipe(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By which it compares runs; and what it prints is not on the standard output of --json."""
    (tmp_path / "trackio.py").write_text(
        "print('loaded')\n"
        "def init(**given):\n    global run\n    run = given\n    print('begun')\n    import trackio\n"
        "    return trackio\n"
        "def log(numbers, step): print(numbers)\n"
        "def finish(): print('finished')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    out = tmp_path / "run"
    assert _main(command(place, out, "--steps", "2", "--log.tracker", "trackio", "--json")) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["steps"] == 2
    assert "begun" in shown.err
    told = sys.modules["trackio"].run["config"]
    assert told["recipe"] == tomllib.loads((out / "recipe.toml").read_text())
    assert told["parameters"] == json.loads((out / "run.json").read_text())["parameters"]
    assert told["device"] == name_of(torch.device("cpu"))
    monkeypatch.delitem(sys.modules, "trackio")


def test_the_model_generates(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["generate", str(whole), "Return a", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("Return a")


def test_again_it_does_nothing(place: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}

    before = files()
    assert _main(command(place, whole)) == 0
    assert files() == before
    assert "going on after step 6" in capsys.readouterr().out
    assert _main(command(place, whole, "--resume")) == 0


def test_json(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One object and nothing else, whether it trains or is complete."""
    for _ in range(2):
        capsys.readouterr()
        assert _main(command(place, tmp_path / "run", "--json", "--steps", "2")) == 0
        told = json.loads(capsys.readouterr().out)
        assert told["out"] == str(tmp_path / "run")
        assert (told["steps"], told["stopped"]) == (2, None)
        evaluations = [r["eval"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "eval" in r]
        assert (told["before"], told["after"]) == (evaluations[0], evaluations[-1])


def test_flags_override_the_recipe(place: Path, tmp_path: Path) -> None:
    flags = ("--optim.lr", "5e-3", "--steps", "1", "--model.repeats", "2", "--sample.prompts", "It", "The")
    assert _main(command(place, tmp_path / "run", *flags, "--log.no-tensorboard")) == 0
    kept = load_recipe(tmp_path / "run" / "recipe.toml")
    assert (kept.optim.lr, kept.steps, kept.model.repeats) == (5e-3, 1, 2)
    assert kept.sample.prompts == ("It", "The")
    assert json.loads((tmp_path / "run" / "run.json").read_text())["config"]["repeats"] == 2
    assert not (tmp_path / "run" / "tensorboard").exists()


def test_a_mixture(place: Path, tmp_path: Path) -> None:
    """Of two folders, three to one; each is evaluated, and both together."""
    out = tmp_path / "run"
    data = ["--data.train", str(place / "one"), str(place / "two"), "--data.weights", "3", "1"]
    assert _main(["train", str(place / "tiny.toml"), *data, "--steps", "2", "--out", str(out)]) == 0
    state = json.loads((out / "checkpoints" / "step-00000002" / "state.json").read_text())
    assert state["loader"]["windows"] == [12, 4]
    last = [record["eval"] for record in read_metrics(out / "metrics.jsonl") if "eval" in record][-1]
    losses = [last[f"{place / name}/loss"] for name in ("one", "two")]
    assert min(losses) < last["loss"] < max(losses)
    assert _main(["train", str(place / "tiny.toml"), *data[:-1], "2", "--steps", "2", "--out", str(out)]) == 2


def test_from_the_weights_of_a_model(place: Path, whole: Path, tmp_path: Path) -> None:
    assert (
        _main(command(place, tmp_path / "run", "--model.init-from", str(whole / "model"), "--steps", "1"))
        == 0
    )
    records = [read_metrics(out / "metrics.jsonl") for out in (whole, tmp_path / "run")]
    ended, began = (
        next(r["eval"] for r in each if "eval" in r) for each in (reversed(records[0]), records[1])
    )
    assert began["loss"] == pytest.approx(ended["loss"], rel=1e-6)


# Stopping and going on


def stop_at(step: int, number: int) -> Callable[[TrainingProgress, Record], None]:
    update = TrainingProgress.update

    def updated(self: TrainingProgress, record: Record) -> None:
        update(self, record)
        if record["step"] == step and "loss" in record:
            os.kill(os.getpid(), number)

    return updated


def test_a_run_of_warming_up_alone_is_said(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "The learning rate only rises: --schedule.warmup-steps 2 is not below the 2 steps of the run"
    for steps, is_said in (("2", True), ("3", False)):
        assert _main(command(place, tmp_path / steps, "--steps", steps)) == 0
        assert (words in capsys.readouterr().out) == is_said


@pytest.mark.parametrize(
    ("recipe", "word", "flag"),
    [("qat-cpu", "MODEL", "--model.init-from"), ("distill-cpu", "TEACHER", "--distill.teacher")],
)
def test_a_recipe_that_begins_with_a_model(
    recipe: str, word: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert f"name {word} by {flag}: a model directory, a run or a Hub id" in refused(
        capsys, ["train", recipe]
    )


@pytest.mark.parametrize(
    ("number", "code", "background"),
    [(signal.SIGINT, 130, False), (signal.SIGTERM, 75, True), (signal.SIGUSR1, 75, False)],
)
def test_stopped_and_gone_on_with(
    place: Path,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    code: int,
    background: bool,
) -> None:
    """The model and every record, equal to the bit to those of the run that was not stopped."""
    flags = ["--checkpoint.asynchronous"] if background else []
    with monkeypatch.context() as patch:
        patch.setattr(TrainingProgress, "update", stop_at(3, number))
        assert _main(command(place, tmp_path / "run", *flags)) == code
    said = capsys.readouterr().out
    assert "Stopped after step 3 of 6; the same command goes on from there." in said
    assert "before the first step" not in said
    assert not same_model(tmp_path / "run", whole)  # the model so far
    assert _main(command(place, tmp_path / "run", *flags, "--resume")) == 0
    assert "going on after step 3" in capsys.readouterr().out
    assert timeless(tmp_path / "run") == timeless(whole)
    assert same_model(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_before_the_first_step(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """While a teacher is still asked, say: nothing to save, but the job is to be requeued all the same."""

    def asked(*arguments: Any, **options: Any) -> None:
        os.kill(os.getpid(), number)
        raise AssertionError("the signal was not heeded")

    before = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)]
    monkeypatch.setattr(run_parts, "loader", asked)
    assert _main(command(place, tmp_path / "run")) == 75
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)] == before


def test_what_asks_again_at_the_end_finds_a_run_that_ends(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scheduler's SIGTERM after its warning, while the model is written: the job is still to be requeued."""
    keep = run_parts.keep_model

    def asked(*arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        keep(*arguments)

    monkeypatch.setattr(TrainingProgress, "update", stop_at(3, signal.SIGUSR1))
    monkeypatch.setattr(run_parts, "keep_model", asked)
    assert _main(command(place, tmp_path / "run")) == 75
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()


def wait_for(file: Path, words: str, running: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not (file.exists() and words in file.read_text()):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.02)


def test_a_scheduler_s_warning_requeues(place: Path, tmp_path: Path) -> None:
    """SIGUSR1, as `sbatch --signal` sends it: exit code 75, which a job script answers with a requeue."""
    out = tmp_path / "run"
    arguments = process(command(place, out, "--steps", "100000", "--evaluate-every", "100000"))
    running = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_for(out / "metrics.jsonl", '"step": 5', running)
    running.send_signal(signal.SIGUSR1)
    printed, errors = running.communicate(timeout=300)
    assert running.returncode == 75, errors
    assert "the same command goes on from there" in printed
    assert "before the first step" in printed  # that is when the only evaluation was
    assert "Traceback" not in errors
    steps = [record["step"] for record in read_metrics(out / "metrics.jsonl") if "loss" in record]
    assert (out / "checkpoints" / f"step-{steps[-1]:08d}").is_dir()


@pytest.mark.slow
def test_two_processes(place: Path, whole: Path, tmp_path: Path) -> None:
    """Under torchrun: the losses of one; a Ctrl-C, which torchrun passes on a second time, leaves a checkpoint."""
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / "run"
    done = subprocess.run(
        process(command(place, out, "--json"), *torchrun),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == STEPS  # and the second process says nothing
    ours, theirs = (
        [
            record["loss"] if "loss" in record else record["eval"]["loss"]
            for record in timeless(path)
            if "samples" not in record
        ]
        for path in (out, whole)
    )
    assert ours == pytest.approx(theirs, rel=1e-4)
    arguments = process(
        command(place, tmp_path / "stopped", "--steps", "100000", "--evaluate-every", "100000"), *torchrun
    )
    running = subprocess.Popen(
        arguments,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    wait_for(tmp_path / "stopped" / "metrics.jsonl", '"step": 3', running)
    os.killpg(running.pid, signal.SIGINT)  # as the terminal does
    printed, errors = running.communicate(timeout=300)
    steps = [r["step"] for r in read_metrics(tmp_path / "stopped" / "metrics.jsonl") if "loss" in r]
    assert f"Stopped after step {steps[-1]} of 100000" in printed, errors
    assert (tmp_path / "stopped" / "checkpoints" / f"step-{steps[-1]:08d}").is_dir()


# Refusals


def test_refuses_to_resume_from_nothing(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, command(place, tmp_path / "run", "--resume"))
    assert said == f"{tmp_path / 'run'}: has no checkpoint to go on from; leave --resume out to start afresh"
    assert not list(tmp_path.iterdir())


def test_refuses_a_folder_of_something_else(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    assert "holds something else than a training run" in refused(capsys, command(place, tmp_path))
    assert "thesis.txt: is a file; choose another --out" in refused(
        capsys, command(place, tmp_path / "thesis.txt")
    )
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_refuses_a_run_of_other_settings(
    place: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (whole / "recipe.toml").read_bytes()
    for flags, words in (
        (["--optim.lr", "1e-3"], "--optim.lr 0.01, not 0.001"),
        (["--model.repeats", "3"], "repeats = 1, not 3"),
        (["--steps", "7"], "steps = 6, not 7"),
    ):
        assert _main(command(place, whole, *flags)) == 2
        shown = capsys.readouterr()
        assert words in shown.err
        assert shown.out == ""  # nothing is announced that is then refused
    assert "the loader has tokens = " in refused(capsys, command(place, whole, data="two"))
    assert (whole / "recipe.toml").read_bytes() == before


def test_a_refused_start_does_not_spoil_the_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was wrong can be mended and the command given again."""
    out = tmp_path / "run"
    long = ["--batch.sequence-length", "256", "--batch.tokens-per-step", "512"]
    assert "longer than the model's context of 128" in refused_as_planned(capsys, command(place, out, *long))
    assert "fewer than the" in refused_as_planned(
        capsys, command(place, out, "--batch.tokens-per-step", "320000")
    )
    assert _main(command(place, out, "--steps", "1")) == 0


def test_refuses_wrong_recipes(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All that is wrong, in one line that names the file."""
    file = tmp_path / "wrong.toml"
    for first, optim, words in (
        ("stepps = 3", "learning_rate = 1", ["unknown key stepps", "unknown key optim.learning_rate"]),
        (
            "seed = '1'",
            "lr = '1'",
            ["seed = '1' must be of type int", "optim.lr = '1' must be of type float"],
        ),
        ("seed = -1", "lr = -1", ["seed = -1 must be 0 or above", "optim.lr = -1.0 must be above 0"]),
        ("seed = ", "", ["not TOML"]),
    ):
        file.write_text(first + RECIPE.replace("lr = 1e-2", optim))
        said = refused(capsys, ["train", str(file), "--out", str(tmp_path / "run")])
        assert said.startswith(f"{file}: ")
        for word in words:
            assert word in said
    assert [path.name for path in tmp_path.iterdir()] == ["wrong.toml"]


def test_refuses_wrong_flags(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, words in (
        (
            ["--optim.lr", "-1", "--seed", "-1"],
            ["--optim.lr -1.0 must be above 0", "seed -1 must be 0 or above"],
        ),
        (["--optim.lr", "much"], ["optim.lr", "much"]),
        (["--optim.learning-rate", "1"], ["optim.learning-rate"]),
        (["--data.weights", "1", "2"], ["--data.weights has 2 numbers, --data.train 1 names"]),
        (["--model.preset", "tiniest"], ["preset 'tiniest' is not known"]),
        (["--model.vocab-size", "100"], ["--model.vocab-size 100 is below the tokenizer's"]),
        (["--model.init-from", str(tmp_path)], [str(tmp_path)]),
        (["--devices", "4"], ["--devices 4 is for --plan", "torchrun"]),
        (["--device", "tpu"], ["--device 'tpu' cannot be trained on; choose cpu or cuda"]),
        (["--device", "cuda:x"], ["choose cpu or cuda"]),
    ):
        told = refused if flags[0] == "--devices" else refused_as_planned
        said = told(capsys, command(place, tmp_path / "run", *flags))
        for word in words:
            assert word in said
    assert not list(tmp_path.iterdir())
    assert "name a recipe first: " in refused(capsys, ["train", "--steps", "3"])
    assert "name a recipe first: " in refused(capsys, ["train", "--sample.prompts", "x" * 300, "tiny-cpu"])
    assert "no such recipe file; recipes of the package are" in refused(capsys, ["train", "absent"])


def test_refuses_data_that_does_not_fit(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ["--data.train", str(place / "one"), str(place / "other")]
    recipe, out = str(place / "tiny.toml"), ["--out", str(tmp_path / "run")]
    said = refused_as_planned(capsys, ["train", recipe, *both, *out])
    assert f"{place / 'other'} was made with another tokenizer than {place / 'one'}; prepare it again" in said
    assert "was made with another tokenizer" in refused(
        capsys, command(place, tmp_path / "run", "--data.held-out", str(place / "other"))
    )
    shutil.copytree(place / "one", tmp_path / "one")
    index = read_index(tmp_path / "one")
    shards = tuple(shard for shard in index.shards if shard.split == "train")
    write_index(tmp_path / "one", replace(index, shards=shards))
    said = refused_as_planned(capsys, ["train", recipe, "--data.train", str(tmp_path / "one"), *out])
    assert f"{tmp_path / 'one'} has nothing held out to evaluate on; name folders that have" in said
    assert str(tmp_path / "none") in refused(
        capsys, ["train", recipe, "--data.train", str(tmp_path / "none"), *out]
    )
    assert not (tmp_path / "run").exists()


def test_refuses_a_model_of_another_tokenizer(
    place: Path, whole: Path, small_text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the same shape: the rows of its embedding would stand for other pieces."""
    text, vocab_size = small_text.read_text(), Tokenizer.load(whole / "model").vocab_size
    tokenizer = Tokenizer.train(iter([text.upper()]), vocab_size)
    shutil.copytree(whole / "model", tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    flags = ["--model.init-from", str(tmp_path / "model")]
    said = refused_as_planned(capsys, command(place, tmp_path / "run", *flags))
    assert "has another tokenizer than the data; prepare the data with the model's own" in said


@pytest.mark.parametrize(
    "preparation",
    [
        {"documents_without_bos": 3},
        {"merged": 2, "preparations": [{"documents_without_bos": 0}, {"documents_without_bos": 3}]},
    ],
)
def test_refuses_a_mask_without_borders(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], preparation: dict[str, Any]
) -> None:
    """Shards imported from the reference's layout may lack BOS, by which documents are told apart."""
    shutil.copytree(place / "one", tmp_path / "one")
    write_index(tmp_path / "one", replace(read_index(tmp_path / "one"), preparation=preparation))
    data = ["--data.train", str(tmp_path / "one")]
    said = refused(capsys, command(place, tmp_path / "run", *data, "--data.document-mask"))
    assert "--data.document-mask" in said or "data.document_mask = true goes by BOS" in said
    held_out = ["--data.held-out", str(tmp_path / "one"), "--data.document-mask"]
    said = refused(capsys, command(place, tmp_path / "run", *held_out))  # evaluated with the mask, too
    assert f"documents of {tmp_path / 'one'} have none" in said
    assert _main(command(place, tmp_path / "run", *data, "--steps", "1")) == 0


def test_refuses_a_recipe_s_own_folder(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a person wrote there as recipe.toml would be written over."""
    (tmp_path / "recipe.toml").write_text("# mine\n" + RECIPE)
    flags = ["--data.train", str(place / "one"), "--out", str(tmp_path)]
    said = refused(capsys, ["train", str(tmp_path / "recipe.toml"), *flags])
    assert "holds something else than a training run" in said
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


def test_refuses_tokens_outside_the_vocabulary(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of damaged shards, before the model sees them; the last token of a window is a target only."""
    shutil.copytree(place / "one", tmp_path / "one")
    (file,) = (tmp_path / "one").glob("train-*.bin")
    tokens = np.fromfile(file, "<u2")
    tokens[32::32] = 40_000
    tokens.tofile(file)
    said = refused(capsys, command(place, tmp_path / "run", "--data.train", str(tmp_path / "one")))
    assert "… 40000 do not lie in the vocabulary of 384; mobilellm shards verify" in said


@pytest.mark.slow
def test_samples_beside_compiled_blocks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding has kernels that torch's compiler fails on: it must not be given them. (Generating code takes a
    minute and is torch's business.)
    """
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        seen.append(graph.code)
        return graph.forward

    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(Block, "compile", lambda block: compile_module(block, backend=backend), raising=False)
    assert _main(command(place, tmp_path / "run", "--compute.compile", "--steps", "1")) == 0
    assert sum("samples" in record for record in read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2
    assert seen
    assert not [code for code in seen if "mkldnn" in code]


def test_starts_from_a_run_and_keeps_when_it_began(place: Path, whole: Path, tmp_path: Path) -> None:
    """A run stands for the model in it; a run that goes on has begun when it first did."""
    started = json.loads((whole / "run.json").read_text())["started"]
    assert _main(command(place, tmp_path / "run", "--model.init-from", str(whole), "--steps", "1")) == 0
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")[0]["eval"]["loss"]
    last = [record for record in read_metrics(whole / "metrics.jsonl") if "eval" in record][-1]["eval"][
        "loss"
    ]
    assert first == pytest.approx(last, rel=1e-3)
    card = json.loads((tmp_path / "run" / "run.json").read_text())
    (tmp_path / "run" / "run.json").write_text(json.dumps(card | {"started": started}))
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000001")
    (tmp_path / "run" / "checkpoints").mkdir(exist_ok=True)
    assert _main(command(place, tmp_path / "run", "--model.init-from", str(whole), "--steps", "1")) == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["started"] == started


def test_refuses_a_model_of_another_shape(
    place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model.init-from", str(whole / "model"), "--model.num-layers", "3", "--model.repeats", "2"]
    said = refused_as_planned(capsys, command(place, tmp_path / "run", *flags))
    assert "has another shape (num_layers = 2 there, 3 here; repeats = 1 there, 2 here)" in said


def test_refuses_a_quantised_model(
    place: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It could not be saved after training: whole numbers and scales are not what training changes."""
    assert _main(["quantize", str(whole / "model"), str(tmp_path / "q"), "--eval-tokens", "0"]) == 0
    capsys.readouterr()
    said = refused_as_planned(
        capsys, command(place, tmp_path / "run", "--model.init-from", str(tmp_path / "q"))
    )
    assert f"init-from {tmp_path / 'q'} is quantised; start from what it was made from" in said
