"""Train by a recipe: one that comes with the package, or a TOML file of yours.

    mobilellm train tiny-cpu --data.train shards --out runs/tiny
    torchrun --standalone --nproc-per-node=4 -m mobilellm train pretrain-125m --data.train shards --out runs/m

Every leaf of the recipe is a flag. The same command goes on where a run stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import statistics
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilellm.cli import recipe_flags, run_folder, run_parts
from mobilellm.cli.complaints import perhaps
from mobilellm.cli.qat_parts import Qat
from mobilellm.cli.run_parts import RunText
from mobilellm.installation import program
from mobilellm.train.recipe import Recipe, load_recipe, recipe_names, to_toml, with_steps, with_tables

if TYPE_CHECKING:
    from mobilellm.config import ModelConfig
    from mobilellm.train.distributed import World
    from mobilellm.train.loop import Outcome

REQUEUE = 75
"""Exit code when a scheduler asked to stop (SIGTERM, SIGUSR1): EX_TEMPFAIL of sysexits.h, start me again."""
FAILED = 2
"""That of the processes that leave it to another to say why, and of that one."""
_NO_FLAGS_OF_TEXTS = ("--data", "--train", "--dataset", "--text", "--train-data", "--train-file")
in_flags = recipe_flags.in_flags  # by which main tells what went wrong


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """What goes with any recipe."""

    settings: Annotated[Recipe, tyro.conf.arg(name=""), tyro.conf.AvoidSubcommands]
    out: Path = field(default=Path("runs/train"))
    """Folder of the run: checkpoints, metrics, the model at the end."""
    resume: bool = False
    """Refuse to start afresh: go on from a checkpoint in --out, or stop."""
    plan: bool = False
    """Say what would happen (memory, tokens, days) and do nothing."""
    devices: int = 1
    """For --plan: how many devices."""
    device: str | None = None
    """cpu or cuda; by default a GPU where there is one. With --plan: the one of this machine to plan for."""
    json: bool = False
    """Print one JSON object at the end (or of the plan)."""


@dataclass(frozen=True, kw_only=True)
class Arguments(RunFlags):
    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Name of a recipe of the package, or a TOML file. It must come first."""


def default_arguments(rest: Sequence[str]) -> Arguments:
    """Arguments with the recipe's values, which flags then override."""
    if rest and not rest[0].startswith("-"):
        recipe = with_tables(recipe_named(rest[0]), tables_named(rest))
        flag = "--data.train SHARDS" if recipe.chat is None else "--chat.train FILE"
        refuse_texts(f"train {rest[0]}", rest[1:], flag)
        return Arguments(recipe=rest[0], settings=recipe)
    if {"-h", "--help"} & set(rest):
        return Arguments(recipe="tiny-cpu", settings=load_recipe("tiny-cpu"))
    for word in rest:
        _refuse_folder(word)
    raise ValueError(f"train: name a recipe first: {', '.join(recipe_names())}, or a TOML file")


def recipe_named(name: str) -> Recipe:
    """`load_recipe`, with the recipe that was likely meant where there is none of that name."""
    _refuse_folder(name)
    try:
        return load_recipe(name)
    except FileNotFoundError as error:
        what, known = str(error).split(";", 1)
        raise FileNotFoundError(f"{what}{perhaps(name, recipe_names()) or ';'}{known}") from None


def _refuse_folder(name: str) -> None:
    """A run named in place of its recipe."""
    if name and name not in recipe_names() and os.path.isfile(os.path.join(name, "recipe.toml")):
        run = shlex.quote(name.rstrip("/") or name)
        raise ValueError(
            f"{name}: is a run; it goes on with: {program()} train {run}/recipe.toml --out {run}"
        )


def refuse_texts(command: str, rest: Sequence[str], flag: str) -> None:
    """What is trained on, named without its flag or by another."""
    word = next(iter(rest), "")
    other = next((each for each in rest if each.partition("=")[0] in _NO_FLAGS_OF_TEXTS), "")
    if (word and not word.startswith("-")) or other:
        raise ValueError(
            f"{command.partition(' ')[0]}: {other.partition('=')[0] or word} names nothing to train on; "
            f"that is: mobilellm {command} {flag}"
        )


def tables_named(rest: Sequence[str]) -> set[str]:
    """The tables of a recipe that flags name: --TABLE.LEAF."""
    return {word[2:].partition(".")[0] for word in rest if word.startswith("--") and "." in word}


def run(arguments: Arguments) -> None:
    recipe = arguments.settings
    _check_models_are_named(recipe)
    if arguments.devices != 1 and not arguments.plan:
        raise ValueError(
            f"train: devices = {arguments.devices} is for --plan; several devices are started by torchrun "
            "--nproc-per-node or srun"
        )
    text = run_parts.text(recipe)
    if arguments.plan and not text.is_there:
        _plan(arguments, recipe, recipe.model.config(), None)  # with the preset's vocabulary
        return
    tokenizer = text.tokenizer
    config = recipe.model.config(tokenizer.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"train: model.vocab_size = {config.vocab_size} is below the tokenizer's {tokenizer.vocab_size}"
        )
    run_folder.check_folder(arguments.out, arguments.resume)
    if arguments.plan:
        text.read(quiet=arguments.json)
        _plan(arguments, with_steps(recipe, text.sequences) if recipe.epochs else recipe, config, text)
        return
    from mobilellm.train.distributed import ToldByAnother, join
    from mobilellm.train.stop_requests import ended_on_request

    try:
        with ended_on_request(REQUEUE), join(arguments.device) as world:
            outcome = _train(arguments, config, text, world)
    except ToldByAnother:
        sys.exit(FAILED)
    if outcome.stopped:
        sys.exit(130 if outcome.stopped == "interrupt" else REQUEUE)


def _check_models_are_named(recipe: Recipe) -> None:
    """Recipes that begin with a model have a word in place of one, for the command line to fill in."""
    teacher = None if recipe.distill is None else recipe.distill.teacher
    for flag, value in (("--model.init-from", recipe.model.init_from), ("--distill.teacher", teacher)):
        if str(value) in ("MODEL", "TEACHER") and not Path(str(value)).exists():
            raise ValueError(f"train: name {value} by {flag}: a model directory, a run or a Hub id")


def _train(arguments: Arguments, config: ModelConfig, text: RunText, world: World) -> Outcome:
    from mobilellm.report.progress import TrainingProgress, say_stopping
    from mobilellm.train.loop import train
    from mobilellm.train.stop_requests import stop_requests
    from mobilellm.train.trackers import Trackers

    out = arguments.out
    text.read(quiet=arguments.json or not world.is_first)
    recipe = (
        with_steps(arguments.settings, text.sequences) if arguments.settings.epochs else arguments.settings
    )
    run_parts.check(recipe, config, world.size)
    model = run_parts.model(recipe, config, text.tokenizer, world)
    qat = None if recipe.qat is None else Qat(recipe.qat, model)
    evaluate, speak = run_parts.evaluator(recipe, text, world), run_parts.speaker(recipe, text)
    loader = run_parts.loader(recipe, text, world, quiet=arguments.json)  # a teacher may take hours: the last
    with contextlib.ExitStack() as stack:
        watchers: list[Callable[[dict[str, Any]], None]] = []

        def on_start(first: int) -> None:
            card = run_parts.card(out.name, recipe, config, text, first, world)
            asked = {"recipe": tomllib.loads(to_toml(recipe))}  # by which trackers compare runs
            trackers = stack.enter_context(Trackers(out, recipe.log, card | asked, first))
            watchers.extend((run_folder.FolderFiles(out, recipe, card, text.left_out), trackers.update))
            if arguments.json:
                return
            print(_opening(recipe, card, first), flush=True)
            if qat is not None:
                print(qat.described, flush=True)
            peak = card["peak_flops"] and card["peak_flops"] * world.size
            bar = TrainingProgress(recipe.steps, first, card["flops_per_token"], peak)
            watchers.append(stack.enter_context(bar).update)

        def on_record(record: dict[str, Any]) -> None:
            for watcher in watchers:
                watcher(record)

        if qat is not None:
            evaluate, speak = qat.of_the_quantized(evaluate), qat.of_the_quantized(speak)
        outcome = train(
            model,
            loader,
            recipe,
            out,
            evaluate,
            on_record,
            run_parts.loss_function(recipe),
            world,
            speak,
            say_stopping if world.is_first else None,
            None if qat is None else qat.passes,
            on_start if world.is_first else None,
        )
    with stop_requests():  # one that comes now finds the run at its end: it must not change the exit code
        run_parts.keep_model(out, model, recipe, text, world)
        if qat is not None and world.is_first:
            qat.keep(out, text.tokenizer)
        if world.is_first:
            _closing(arguments, recipe, outcome)
        world.gather(None)  # a launcher ends who is still at work a while after another is done
    return outcome


def _opening(recipe: Recipe, card: Mapping[str, Any], first: int) -> str:
    at = f", going on after step {first:,}" if first else ""
    trained = f", {card['trained_parameters']:,} of adapters trained" if recipe.lora is not None else ""
    warmup = recipe.schedule.warmup_steps
    note = (
        f"\nThe learning rate only rises: --schedule.warmup-steps {warmup} is not below the {recipe.steps} "
        "steps of the run"
    )
    return (
        f"{card['parameters']:,} parameters{trained}, {recipe.steps:,} steps of "
        f"{recipe.batch.tokens_per_step:,} tokens on {card['world_size']} x {card['device']}{at}"
        + note
        * (warmup >= recipe.steps)
    )


def _closing(arguments: Arguments, recipe: Recipe, outcome: Outcome) -> None:
    from mobilellm.train.metrics import read_metrics

    records = read_metrics(arguments.out / "metrics.jsonl")
    evaluations = [record for record in records if "eval" in record]
    after = evaluations[-1]["eval"] if evaluations else {}
    before = evaluations[0]["eval"] if evaluations else {}
    step = evaluations[-1]["step"] if evaluations else 0
    at = "" if step == outcome.steps else f" after step {step}" if step else " before the first step"
    if arguments.json:
        result = {"out": str(arguments.out), **outcome._asdict(), "before": before, "after": after}
        print(json.dumps(result))
        return
    for name in [name for name in ("perplexity", "bits_per_byte") if name in before]:
        print(f"      held-out {name.replace('_', ' '):<16} {_change(before[name], after[name])}{at}")
    if steps := [record for record in records if "loss" in record]:
        print(_speed(steps))
    out, call = shlex.quote(str(arguments.out)), program()
    if outcome.stopped:
        print(f"Stopped after step {outcome.steps} of {recipe.steps}; the same command goes on from there.")
    prompt = shlex.quote(next(iter(recipe.sample.prompts), "Once upon a time"))
    model = out if recipe.qat is None else shlex.quote(str(arguments.out / "quantized"))
    talk = f"generate {model} {prompt} --temperature 0.7" if recipe.chat is None else f"chat {model}"
    merge = "" if recipe.lora is None else f"\n  {call} merge {out} --out {out}-merged"
    print(f"Go on:\n  {call} report {out}{merge}\n  {call} {talk}")


def _change(before: float, after: float) -> str:
    """From one evaluation to another; of a run that was stopped before the second, the one there is."""
    return f"{before:>10,.3f}" + (f" -> {after:,.3f}" if after != before else "")


def _speed(steps: Sequence[Mapping[str, Any]]) -> str:
    """Median speed, the share of the time that no batch was ready, and the most memory that was used."""
    tokens = steps[0]["tokens"] / steps[0]["step"]
    seconds = [record["seconds"] for record in steps]
    waiting = sum(record["data_seconds"] for record in steps) / sum(seconds)
    return (
        f"      {tokens / statistics.median(seconds):,.0f} tokens/s, {waiting:.1%} of the time without data, "
        f"{max(record['peak_memory_bytes'] for record in steps) / 1e9:.2f} GB at most"
    )


def _plan(arguments: Arguments, recipe: Recipe, config: ModelConfig, text: RunText | None) -> None:
    """Without text: before there is data. What would refuse the run at its start refuses its plan, too."""
    from mobilellm.cli.plan_sheet import plan_json, print_plan
    from mobilellm.train.device import this_device
    from mobilellm.train.distributed import named_device
    from mobilellm.train.plan import make_plan

    if not recipe.steps:
        raise ValueError("train: the steps of epochs follow from the data, which is not there; give --steps")
    if arguments.devices < 1:
        raise ValueError(f"train: devices = {arguments.devices} must be at least 1")
    on_gpu = named_device(arguments.device).type == "cuda"
    teaching = run_parts.looked_at(recipe, config, text, arguments.devices, on_gpu)
    device = this_device(recipe.compute.precision, kind=arguments.device)
    plan = make_plan(recipe, config, arguments.devices, device, teaching=teaching)
    if arguments.json:
        print(json.dumps(plan_json(plan), indent=2))
    else:
        print_plan(plan)
