"""What a recipe names, built: text, model, loss; and what a run leaves behind.

The loop knows none of these rooms; the command line hands them to it. A kind of run hooks in here: what is
done to a model before it is trained at the end of `model`, what batches bring in `loader`, another loss in
`loss_function`, what is written in `keep_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mobilellm.cli import distill_parts, lora_parts
from mobilellm.cli.conversation_text import ChatText
from mobilellm.cli.qat_parts import chosen_scheme
from mobilellm.cli.shard_text import ShardText
from mobilellm.train.recipe import Recipe

if TYPE_CHECKING:
    from mobilellm.config import ModelConfig
    from mobilellm.data.chat import Skip
    from mobilellm.model.checkpoint import Weights
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.train.distributed import LossFunction, World
    from mobilellm.train.feed import Loader
    from mobilellm.train.loop import Evaluator, Speaker
    from mobilellm.train.teacher_cost import Teaching


class RunText(Protocol):
    """The text of a run, to train on and to evaluate on."""

    @property
    def is_there(self) -> bool:
        """Whether its files exist: a run can be planned before there are shards."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    @property
    def chat_template(self) -> str | None:
        """That the model is to keep; None of one that completes text."""

    def read(self, quiet: bool) -> None:
        """What takes a while, to be done once; it says what it found unless `quiet`."""

    @property
    def left_out(self) -> Sequence[Skip]:
        """What reading found that cannot be used."""

    @property
    def sequences(self) -> int:
        """Of an epoch."""

    def loader(self, world: World) -> Loader: ...

    def evaluator(self, world: World) -> Evaluator | None: ...

    def protocol(self, world: World) -> dict[str, Any]:
        """How the evaluator's numbers come about."""

    def speaker(self) -> Speaker | None: ...


def text(recipe: Recipe) -> RunText:
    return ShardText(recipe) if recipe.chat is None else ChatText(recipe)


def loss_function(recipe: Recipe) -> LossFunction:
    """What is made small: the sum over the batch of weight * nats."""
    from mobilellm.train.loss import weighted_loss

    return weighted_loss if recipe.distill is None else distill_parts.loss_function(recipe.distill)


def loader(recipe: Recipe, text: RunText, world: World, quiet: bool) -> Loader:
    """This process's share of the text, with what a teacher says of it where the recipe names one."""
    from mobilellm.train import distributed

    mine = text.loader(world)
    if recipe.distill is None:
        return mine
    whole = text.loader(distributed.World(device=world.device))
    return distill_parts.taught(recipe.distill, mine, whole, recipe.steps, text.tokenizer, world, quiet)


def check(recipe: Recipe, config: ModelConfig, devices: int) -> None:
    """Raise ValueError for what needs no data and no weights to be seen as a mistake, whatever trains.

    ImportError, as who runs the command reads it, for a package that is missing.
    """
    from importlib.util import find_spec

    from mobilellm.train.trackers import check_tracker

    recipe.batch.check(config.max_position_embeddings, devices)
    check_tracker(recipe.log)
    if recipe.qat is not None:
        chosen_scheme(recipe.qat, config)
    if recipe.lora is not None and find_spec("peft") is None:
        raise ModuleNotFoundError("No module named 'peft'", name="peft")


def looked_at(
    recipe: Recipe, config: ModelConfig, text: RunText | None, devices: int, on_gpu: bool
) -> Teaching | None:
    """All that would refuse a run at its start, without it; what a teacher would do, where there is one.

    Without `text`, before there is data, what needs none.
    """
    from mobilellm.train.distributed import World

    check(recipe, config, devices)
    first_weights(recipe, config, None if text is None else text.tokenizer)
    if text is not None:
        text.evaluator(World())
        text.speaker()
        text.loader(World(size=devices))
    if recipe.distill is None:
        return None
    whole = None if text is None else text.loader(World())
    tokenizer = None if text is None else text.tokenizer
    return distill_parts.planned(recipe.distill, whole, tokenizer, recipe, on_gpu)


def first_weights(recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer | None) -> Weights | None:
    """Those of `model.init_from`, checked, as they are stored; None where it starts from fresh ones.

    Raises ValueError for a quantised model, for one of another shape or, where that of the data is known, of
    another tokenizer: its embedding would be shuffled.
    """
    from mobilellm import hub
    from mobilellm.model import checkpoint
    from mobilellm.model.api import read_tokenizer

    source = recipe.model.init_from
    if source is None:
        return None
    directory = hub.resolve(source, lambda notice: None)  # a run stands for its model; a Hub id is fetched
    weights = checkpoint.read_weights(directory)
    if weights.quantized is not None:
        raise ValueError(f"train: model.init_from = {source} is quantised; start from what it was made from")
    # An adapter is folded into its base again, whose config.json tells how long its context is.
    free = ("initializer_range", *(("max_position_embeddings",) if recipe.lora is None else ()))
    if differences := [
        f"{name} = {value!r} there, {mine!r} here"
        for (name, value), mine in zip(
            weights.config.to_dict().items(), config.to_dict().values(), strict=True
        )
        if value != mine and name not in free
    ]:
        raise ValueError(
            f"train: model.init_from = {source} has another shape ({'; '.join(differences)}); "
            "leave out what differs (--model.preset None takes the shape that is there)"
        )
    own = read_tokenizer(directory, weights.config)
    if own is not None and tokenizer is not None and own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"train: model.init_from = {source} has another tokenizer than the data; prepare the data "
            "with the model's own"
        )
    return weights._replace(config=config)


def model(recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer, world: World) -> MobileLLM:
    """Fresh weights that depend on the seed alone, or `first_weights`, on our device."""
    import torch

    from mobilellm.model import checkpoint
    from mobilellm.model.transformer import MobileLLM

    weights = first_weights(recipe, config, tokenizer)
    if weights is None:
        return MobileLLM(config, torch.Generator().manual_seed(recipe.seed)).to(world.device)
    built = checkpoint.build(weights, torch.float32, str(world.device))
    if recipe.lora is not None:
        lora_parts.put_on(built, recipe.lora, recipe)
    return built


def evaluator(recipe: Recipe, text: RunText, world: World) -> Evaluator | None:
    evaluate = text.evaluator(world)
    return evaluate if evaluate is None or recipe.lora is None else lora_parts.of_merged(evaluate)


def speaker(recipe: Recipe, text: RunText) -> Speaker | None:
    speak = text.speaker()
    return speak if speak is None or recipe.lora is None else lora_parts.of_merged(speak)


def card(
    name: str, recipe: Recipe, config: ModelConfig, text: RunText, step: int, world: World
) -> dict[str, Any]:
    """What run.json says of a start after `step` steps: enough to read the metrics by."""
    import datetime
    from importlib.metadata import version

    import torch

    from mobilellm import __version__
    from mobilellm.accounting import stored_parameters, training_flops_per_token
    from mobilellm.environment import commit
    from mobilellm.hardware import peak_flops
    from mobilellm.train.device import name_of

    on_gpu = world.device.type == "cuda"
    device = name_of(world.device)
    length = recipe.batch.sequence_length
    values = {
        "name": name,
        "config": config.to_dict(),
        "parameters": stored_parameters(config).total,
        "flops_per_token": training_flops_per_token(config, length),
        "flops_per_token_6n": training_flops_per_token(config, length, attention=False),
        "peak_flops": peak_flops(device) if on_gpu else None,
        "device": device,
        "world_size": world.size,
        "tokens_per_step": recipe.batch.tokens_per_step,
        "steps": recipe.steps,
        "evaluation": text.protocol(world),
        "step": step,
        "commit": commit(),
        "versions": {"mobilellm": __version__, "torch": torch.__version__, "numpy": version("numpy")},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    return values if recipe.lora is None else lora_parts.changed_card(values, recipe.lora, config)


def keep_model(out: Path, model: MobileLLM, recipe: Recipe, text: RunText, world: World) -> None:
    """Write out/model, a clean directory that everything else loads; of a run with [lora] out/adapter.

    What comes of another model stays under its licence, whose texts go along.
    """
    from mobilellm import hub
    from mobilellm.licence import licence_files
    from mobilellm.model import checkpoint
    from mobilellm.train.distributed import is_sharded, whole_model

    plain = whole_model(model) if world.size > 1 and is_sharded(model) else model
    if world.is_first and plain is not None:
        source = recipe.model.init_from
        if recipe.lora is not None and source is not None:
            lora_parts.keep(out, plain, source, text.tokenizer, text.chat_template)
            return
        licence = [] if source is None else licence_files(hub.resolve(source, lambda notice: None))
        checkpoint.save(
            out / "model",
            plain,
            text.tokenizer,
            overwrite=True,
            further_files=licence,
            chat_template=text.chat_template,
        )
