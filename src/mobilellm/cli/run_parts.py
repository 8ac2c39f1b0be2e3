"""What a recipe names, built: tokenizer, model, data, evaluation, samples; and what a run leaves behind.

The loop knows none of these rooms; the command line hands them to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm.train.recipe import Recipe

if TYPE_CHECKING:
    from mobilellm.config import ModelConfig
    from mobilellm.data.loader import PackedLoader
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.train.distributed import World


def tokenizer(recipe: Recipe) -> Tokenizer:
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


def model(recipe: Recipe, config: ModelConfig, tokenizer: Tokenizer, world: World) -> MobileLLM:
    """Fresh weights that depend on the seed alone, or those of `model.init_from`, on our device.

    Raises ValueError for a model of another shape, or of another tokenizer: its embedding would be shuffled.
    """
    import torch

    from mobilellm.model import checkpoint, hub
    from mobilellm.model.api import read_tokenizer
    from mobilellm.model.transformer import MobileLLM

    source = recipe.model.init_from
    if source is None:
        return MobileLLM(config, torch.Generator().manual_seed(recipe.seed)).to(world.device)
    directory = hub.resolve(source, lambda notice: None)  # a run stands for its model; a Hub id is fetched
    weights = checkpoint.read_weights(directory)
    if weights.quantized is not None:
        raise ValueError(f"train: model.init_from = {source} is quantised; start from what it was made from")
    if differences := [
        f"{name} = {value!r} there, {mine!r} here"
        for (name, value), mine in zip(
            weights.config.to_dict().items(), config.to_dict().values(), strict=True
        )
        if value != mine and name not in ("initializer_range", "max_position_embeddings")
    ]:
        raise ValueError(f"train: model.init_from = {source} has another shape ({'; '.join(differences)})")
    own = read_tokenizer(directory, weights.config)
    if own is not None and own.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"train: model.init_from = {source} has another tokenizer than {recipe.data.train[0]}; prepare "
            "the data with the model's own"
        )
    weights = weights._replace(config=config)
    return checkpoint.build(weights, torch.float32, str(world.device))


def loader(recipe: Recipe, tokenizer: Tokenizer, world: World) -> PackedLoader:
    """This process's share of the training splits. Raises ValueError where documents cannot be told apart."""
    from mobilellm.data.loader import PackedLoader
    from mobilellm.data.shards import read_split

    _check_borders(recipe, recipe.data.train)
    return PackedLoader(
        [read_split(folder, "train", tokenizer) for folder in recipe.data.train],
        recipe.batch.sequence_length,
        recipe.batch.sequences_per_step,
        recipe.seed,
        world.rank,
        world.size,
        recipe.data.weights,
        recipe.data.document_mask,
    )


def _check_borders(recipe: Recipe, folders: Sequence[Path]) -> None:
    from mobilellm.data.shards import read_index

    for folder in folders if recipe.data.document_mask else ():
        if _lacks_bos(read_index(folder).preparation):
            raise ValueError(
                f"train: data.document_mask = true goes by BOS, and documents of {folder} have none; import "
                "them again with --add-bos, or leave the mask out"
            )


def _lacks_bos(preparation: Mapping[str, Any]) -> bool:
    """Whether documents were imported without BOS, also into one of the parts of what was merged."""
    parts = preparation.get("preparations", [])
    return bool(preparation.get("documents_without_bos")) or any(map(_lacks_bos, parts))


def evaluator(
    recipe: Recipe, tokenizer: Tokenizer, world: World
) -> Callable[[MobileLLM, int], Mapping[str, float]]:
    """Held-out loss, perplexity and bits per byte, of all folders and of each; ranks share the work.

    As `evaluation_protocol` says: of a model that was saved at that step, the same text gives the same.
    Raises ValueError where nothing is held out, and as `loader` where documents cannot be told apart.
    """
    import torch

    from mobilellm.data.shards import read_index, read_split
    from mobilellm.eval.perplexity import Perplexity, windowed

    protocol = evaluation_protocol(recipe, world)
    limit, half = protocol["most_tokens"], protocol["precision"] == "bfloat16"
    folders = recipe.data.held_out or recipe.data.train
    _check_borders(recipe, folders)
    for folder in folders:
        if not read_index(folder).total("held-out", "tokens"):
            raise ValueError(
                f"train: {folder} has nothing held out to evaluate on; name folders that have with "
                "--data.held-out, or make it again with a larger --held-out"
            )
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
            with torch.autocast(world.device.type, torch.bfloat16, half):
                mine = windowed(
                    model,
                    stream,
                    protocol["window"],
                    rank=world.rank,
                    world_size=world.size,
                    document_mask=protocol["document_mask"],
                )
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


def evaluation_protocol(recipe: Recipe, world: World) -> dict[str, Any]:
    """How the held-out numbers of a run come about; run.json tells it.

    In float32 whatever the run computes in: the model it leaves is stored so, and gives the same numbers.
    Only where fsdp hands out weights in bfloat16 it is that.
    """
    from mobilellm.train.distributed import gathers_in_half

    return {
        "window": recipe.batch.sequence_length,
        "document_mask": recipe.data.document_mask,
        "precision": "bfloat16" if gathers_in_half(world, recipe.compute) else "float32",
        "most_tokens": recipe.data.held_out_tokens,
    }


def speaker(recipe: Recipe, tokenizer: Tokenizer) -> Callable[[MobileLLM, int], list[tuple[str, str]]] | None:
    if not recipe.sample.prompts:
        return None
    import torch

    from mobilellm.model.api import LoadedModel, generate
    from mobilellm.sampling import Sampling

    def speak(model: MobileLLM, step: int) -> list[tuple[str, str]]:
        model.eval()
        loaded = LoadedModel(model, tokenizer, "the model in training")
        sampling = Sampling(temperature=recipe.sample.temperature, seed=recipe.seed)
        # What compute.compile compiles is training's way through the blocks; decoding has kernels of its own.
        with torch.compiler.set_stance("force_eager"):
            said = generate(loaded, recipe.sample.prompts, sampling, recipe.sample.tokens)
        model.inference_layout = None  # a copy of the weights that training has no use for
        return [(prompt, each.text) for prompt, each in zip(recipe.sample.prompts, said, strict=True)]

    return speak


def card(name: str, recipe: Recipe, config: ModelConfig, step: int, world: World) -> dict[str, Any]:
    """What run.json says of a start after `step` steps: enough to read the metrics by."""
    import datetime
    from importlib.metadata import version

    import torch

    from mobilellm import __version__
    from mobilellm.accounting import stored_parameters, training_flops_per_token
    from mobilellm.environment import commit
    from mobilellm.hardware import peak_flops

    on_gpu = world.device.type == "cuda"
    device = torch.cuda.get_device_name(world.device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
    length = recipe.batch.sequence_length
    return {
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
        "evaluation": evaluation_protocol(recipe, world),
        "step": step,
        "commit": commit(),
        "versions": {"mobilellm": __version__, "torch": torch.__version__, "numpy": version("numpy")},
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def keep_model(out: Path, model: MobileLLM, tokenizer: Tokenizer, world: World) -> None:
    """Write out/model, a clean directory that everything else loads."""
    from mobilellm.model import checkpoint
    from mobilellm.train.distributed import is_sharded, whole_model

    plain = whole_model(model) if world.size > 1 and is_sharded(model) else model
    if world.is_first and plain is not None:
        checkpoint.save(out / "model", plain, tokenizer, overwrite=True)
