"""Pretrain by a recipe: one that comes with the package, or a TOML file of yours.

    mobilellm train tiny-cpu --data.train shards --out runs/tiny
    torchrun --standalone --nproc-per-node=4 -m mobilellm train pretrain-125m --data.train shards --out runs/m

Every leaf of the recipe is a flag. The same command goes on where a run stopped.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilellm.atomic import atomic_write
from mobilellm.train.recipe import Recipe, load_recipe, recipe_names, to_toml

if TYPE_CHECKING:
    from mobilellm.config import ModelConfig
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.train.distributed import World
    from mobilellm.train.loop import Outcome

REQUEUE = 75
"""Exit code when a scheduler asked to stop (SIGTERM, SIGUSR1): EX_TEMPFAIL of sysexits.h, start me again."""


@dataclass(frozen=True)
class Arguments:
    recipe: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RECIPE")]
    """Name of a recipe of the package, or a TOML file. It must come first."""
    settings: Annotated[Recipe, tyro.conf.arg(name="")]
    out: Path = field(default=Path("runs/train"))
    """Folder of the run: checkpoints, metrics, the model at the end."""
    resume: bool = False
    """Refuse to start afresh: go on from a checkpoint in --out, or stop."""
    plan: bool = False
    """Say what would happen (memory, tokens, days) and do nothing."""
    devices: int = 1
    """For --plan: how many devices."""
    device: str | None = None
    """cpu or cuda; by default a GPU where there is one."""
    json: bool = False
    """Print one JSON object at the end (or of the plan)."""


def default_arguments(rest: Sequence[str]) -> Arguments:
    """Arguments with the recipe's values, which flags then override."""
    if rest and not rest[0].startswith("-"):
        return Arguments(rest[0], load_recipe(rest[0]))
    if {"-h", "--help"} & set(rest):
        return Arguments("tiny-cpu", load_recipe("tiny-cpu"))
    raise ValueError(f"train: name a recipe first: {', '.join(recipe_names())}, or a TOML file")


def run(arguments: Arguments) -> None:
    recipe = arguments.settings
    if arguments.plan and not all((folder / "index.json").is_file() for folder in recipe.data.train):
        _plan(arguments, recipe.model.config())  # before there is data, with the preset's vocabulary
        return
    tokenizer = _tokenizer(recipe)
    config = recipe.model.config(tokenizer.vocab_size)
    if config.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"train: model.vocab_size = {config.vocab_size} is below the tokenizer's {tokenizer.vocab_size}"
        )
    if arguments.plan:
        _plan(arguments, config)
        return
    _claim(arguments)
    from mobilellm.train.distributed import join

    with join(arguments.device) as world:
        outcome = _train(arguments, config, tokenizer, world)
    if outcome.stopped:
        sys.exit(130 if outcome.stopped == "interrupt" else REQUEUE)


def _tokenizer(recipe: Recipe) -> Tokenizer:
    """The one tokenizer of all folders of shards. Raises ValueError when they differ."""
    from mobilellm.data.shards import read_index
    from mobilellm.tokenizer import Tokenizer

    first = recipe.data.train[0]
    prints = {folder: read_index(folder).tokenizer for folder in (*recipe.data.train, *recipe.data.held_out)}
    for folder, fingerprint in prints.items():
        if fingerprint != prints[first]:
            raise ValueError(
                f"train: {folder} was made with another tokenizer than {first}; prepare it again"
            )
    tokenizer = Tokenizer.load(first / "tokenizer")
    if tokenizer.fingerprint != prints[first]:
        raise ValueError(f"train: {first / 'tokenizer'} is not the tokenizer {first} was made with")
    return tokenizer


def _claim(arguments: Arguments) -> None:
    """Refuse a folder that holds something else, and --resume where nothing is to be resumed."""
    from mobilellm.train.state import checkpoints

    out = arguments.out
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: is a file; choose another --out")
    if (
        out.is_dir()
        and any(out.iterdir())
        and not any((out / name).exists() for name in ("recipe.toml", "checkpoints"))
    ):
        raise ValueError(f"{out}: holds something else than a training run; choose another --out")
    if arguments.resume and not checkpoints(out / "checkpoints"):
        raise ValueError(f"{out}: has no checkpoint to go on from; leave --resume out to start afresh")


def _train(arguments: Arguments, config: ModelConfig, tokenizer: Tokenizer, world: World) -> Outcome:
    from mobilellm.data.loader import PackedLoader
    from mobilellm.data.shards import read_split
    from mobilellm.report.progress import TrainingProgress
    from mobilellm.train.loop import train
    from mobilellm.train.state import checkpoints
    from mobilellm.train.trackers import Trackers

    recipe, out = arguments.settings, arguments.out
    model = _model(recipe, config, world)
    loader = PackedLoader(
        [read_split(folder, "train", tokenizer) for folder in recipe.data.train],
        recipe.batch.sequence_length,
        recipe.batch.sequences_per_step,
        recipe.seed,
        world.rank,
        world.size,
        recipe.data.weights,
        recipe.data.document_mask,
    )
    done = checkpoints(out / "checkpoints")
    first = int(done[-1].name.removeprefix("step-")) if done else 0
    card = _card(arguments, config, model, world)
    with contextlib.ExitStack() as stack:
        watchers: list[Callable[[dict[str, Any]], None]] = []
        if world.is_first:
            trackers = stack.enter_context(Trackers(out, recipe.log, card, first))
            watchers = [_Card(out, recipe, card), trackers.update]
            if not arguments.json:
                print(_opening(recipe, card, first), flush=True)
                peak = card["peak_flops"] and card["peak_flops"] * world.size
                bar = TrainingProgress(recipe.steps, first, card["flops_per_token"], peak)
                watchers.append(stack.enter_context(bar).update)

        def on_record(record: dict[str, Any]) -> None:
            for watcher in watchers:
                watcher(record)

        evaluate, speak = _evaluator(recipe, tokenizer, world), _speaker(recipe, tokenizer)
        outcome = train(model, loader, recipe, out, evaluate, on_record, world=world, speak=speak)
    _keep_model(out, model, tokenizer, world)
    if world.is_first:
        _closing(arguments, outcome)
    return outcome


def _model(recipe: Recipe, config: ModelConfig, world: World) -> MobileLLM:
    """Fresh weights that depend on the seed alone, or those of `model.init_from`, on our device."""
    import torch

    from mobilellm.model import checkpoint
    from mobilellm.model.transformer import MobileLLM

    source = recipe.model.init_from
    if source is None:
        return MobileLLM(config, torch.Generator().manual_seed(recipe.seed)).to(world.device)
    weights = checkpoint.read_weights(source)
    if differences := [
        f"{name} = {value!r} there, {mine!r} here"
        for (name, value), mine in zip(
            weights.config.to_dict().items(), config.to_dict().values(), strict=True
        )
        if value != mine and name not in ("initializer_range", "max_position_embeddings")
    ]:
        raise ValueError(f"train: model.init_from = {source} has another shape ({'; '.join(differences)})")
    weights = weights._replace(config=config)
    return checkpoint.build(weights, torch.float32, str(world.device))


def _evaluator(
    recipe: Recipe, tokenizer: Tokenizer, world: World
) -> Callable[[MobileLLM, int], Mapping[str, float]]:
    """Held-out loss, perplexity and bits per byte, of all folders and of each; ranks share the work."""
    from mobilellm.data.shards import read_split
    from mobilellm.eval.perplexity import Perplexity, windowed

    window, limit = recipe.batch.sequence_length, recipe.data.held_out_tokens
    folders = recipe.data.held_out or recipe.data.train
    streams = {str(folder): read_split(folder, "held-out", tokenizer)[:limit] for folder in folders}
    sizes = {name: tokenizer.num_bytes(stream) for name, stream in streams.items()}

    def numbers(result: Perplexity, num_bytes: int) -> dict[str, float]:
        return {
            "loss": result.loss,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte(num_bytes),
        }

    def evaluate(model: MobileLLM, step: int) -> Mapping[str, float]:
        parts: dict[str, Perplexity] = {}
        for name, stream in streams.items():
            mine = windowed(model, stream, window, rank=world.rank, world_size=world.size)
            nats, tokens = world.sum(mine)
            parts[name] = Perplexity(nats, int(tokens))
        whole = Perplexity(
            sum(part.nats for part in parts.values()), sum(part.tokens for part in parts.values())
        )
        out = numbers(whole, sum(sizes.values()))
        if len(parts) > 1:
            for name, part in parts.items():
                out |= {f"{name}/{key}": value for key, value in numbers(part, sizes[name]).items()}
        return out

    return evaluate


def _speaker(
    recipe: Recipe, tokenizer: Tokenizer
) -> Callable[[MobileLLM, int], list[tuple[str, str]]] | None:
    if not recipe.sample.prompts:
        return None
    from mobilellm.model.api import LoadedModel, generate
    from mobilellm.sampling import Sampling

    def speak(model: MobileLLM, step: int) -> list[tuple[str, str]]:
        model.eval()
        loaded = LoadedModel(model, tokenizer, "the model in training")
        sampling = Sampling(temperature=recipe.sample.temperature, seed=recipe.seed)
        said = generate(loaded, recipe.sample.prompts, sampling, recipe.sample.tokens)
        model.inference_layout = None  # a copy of the weights that training has no use for
        return [(prompt, each.text) for prompt, each in zip(recipe.sample.prompts, said, strict=True)]

    return speak


def _card(arguments: Arguments, config: ModelConfig, model: MobileLLM, world: World) -> dict[str, Any]:
    """What run.json says: enough to read the metrics by."""
    import datetime
    from importlib.metadata import version

    import torch

    from mobilellm import __version__
    from mobilellm.accounting import stored_parameters, training_flops_per_token
    from mobilellm.hardware import peak_flops

    recipe, on_gpu = arguments.settings, world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    length = recipe.batch.sequence_length
    return {
        "name": arguments.out.name,
        "config": config.to_dict(),
        "parameters": stored_parameters(config).total,
        "flops_per_token": training_flops_per_token(config, length),
        "flops_per_token_6n": training_flops_per_token(config, length, attention=False),
        "peak_flops": peak_flops(device) if on_gpu else None,
        "device": device,
        "world_size": world.size,
        "tokens_per_step": recipe.batch.tokens_per_step,
        "steps": recipe.steps,
        "versions": {"mobilellm": __version__, "torch": torch.__version__, "numpy": version("numpy")},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


class _Card:
    """Writes recipe.toml and run.json with the first record: not before is the folder sure to be ours."""

    def __init__(self, out: Path, recipe: Recipe, card: dict[str, Any]) -> None:
        self._files: dict[str, str] = {
            "recipe.toml": to_toml(recipe),
            "run.json": json.dumps(card, indent=2) + "\n",
        }
        self._out = out

    def __call__(self, record: Mapping[str, Any]) -> None:
        for name, text in self._files.items():
            with atomic_write(self._out / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        self._files = {}


def _keep_model(out: Path, model: MobileLLM, tokenizer: Tokenizer, world: World) -> None:
    """Write out/model, a clean directory that everything else loads."""
    from mobilellm.model import checkpoint
    from mobilellm.train.distributed import is_sharded, whole_model

    plain = whole_model(model) if world.size > 1 and is_sharded(model) else model
    if world.is_first and plain is not None:
        checkpoint.save(out / "model", plain, tokenizer, overwrite=True)


def _opening(recipe: Recipe, card: Mapping[str, Any], first: int) -> str:
    at = f", going on after step {first:,}" if first else ""
    return (
        f"{card['parameters']:,} parameters, {recipe.steps:,} steps of {recipe.batch.tokens_per_step:,} "
        f"tokens on {card['world_size']} x {card['device']}{at}"
    )


def _closing(arguments: Arguments, outcome: Outcome) -> None:
    from mobilellm.train.metrics import read_metrics

    records = read_metrics(arguments.out / "metrics.jsonl")
    evaluations = [record for record in records if "eval" in record]
    after = evaluations[-1]["eval"] if evaluations else {}
    before = evaluations[0]["eval"] if evaluations else {}
    if arguments.json:
        result = {"out": str(arguments.out), **outcome._asdict(), "before": before, "after": after}
        print(json.dumps(result))
        return
    for name in [name for name in ("perplexity", "bits_per_byte") if name in before]:
        print(f"      held-out {name.replace('_', ' '):<16} {before[name]:>10,.3f} -> {after[name]:,.3f}")
    out = shlex.quote(str(arguments.out))
    if outcome.stopped:
        print(
            f"Stopped after step {outcome.steps} of {arguments.settings.steps}; "
            "the same command goes on from there."
        )
    print(
        f'Go on:\n  mobilellm report {out}\n  mobilellm generate {out} "Once upon a time" --temperature 0.7'
    )


def _plan(arguments: Arguments, config: ModelConfig) -> None:
    from mobilellm.cli.plan_sheet import plan_json, print_plan
    from mobilellm.train.plan import make_plan

    plan = make_plan(arguments.settings, config, arguments.devices)
    if arguments.json:
        print(json.dumps(plan_json(plan), indent=2))
    else:
        print_plan(plan)
