"""What a pretraining run reads: shards, their tokenizer, how held-out text is evaluated, samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm.train.recipe import Recipe

if TYPE_CHECKING:
    from mobilellm.data.chat import Skip
    from mobilellm.data.loader import PackedLoader
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.train.distributed import World


class ShardText:
    """The folders of `recipe.data`. See `run_parts.RunText`."""

    chat_template: str | None = None

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe

    @property
    def is_there(self) -> bool:
        return all((folder / "index.json").is_file() for folder in self._recipe.data.train)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The one tokenizer of all folders. Raises ValueError when they differ."""
        from mobilellm.data.shards import read_index
        from mobilellm.tokenizer import Tokenizer

        data = self._recipe.data
        first = data.train[0]
        prints = {folder: read_index(folder).tokenizer for folder in (*data.train, *data.held_out)}
        for folder, fingerprint in prints.items():
            if fingerprint != prints[first]:
                raise ValueError(
                    f"train: {folder} was made with another tokenizer than {first}; prepare it again"
                )
        tokenizer = Tokenizer.load(first / "tokenizer")
        if tokenizer.fingerprint != prints[first]:
            raise ValueError(f"train: {first / 'tokenizer'} is not the tokenizer {first} was made with")
        return tokenizer

    def read(self, quiet: bool) -> None:
        """Shards are read as they are needed."""

    @property
    def left_out(self) -> Sequence[Skip]:
        return ()

    @property
    def sequences(self) -> int:
        from mobilellm.train.distributed import World

        return self.loader(World()).num_windows

    def loader(self, world: World) -> PackedLoader:
        """This process's share of the training splits.

        Raises ValueError where documents cannot be told apart."""
        from mobilellm.data.loader import PackedLoader
        from mobilellm.data.shards import read_split

        recipe = self._recipe
        _check_borders(recipe, recipe.data.train)
        return PackedLoader(
            [read_split(folder, "train", self.tokenizer) for folder in recipe.data.train],
            recipe.batch.sequence_length,
            recipe.batch.sequences_per_step,
            recipe.seed,
            world.rank,
            world.size,
            recipe.data.weights,
            recipe.data.document_mask,
        )

    def evaluator(self, world: World) -> Callable[[MobileLLM, int], Mapping[str, float]]:
        """Held-out loss, perplexity and bits per byte, of all folders and of each; ranks share the work.

        As `protocol` says: of a model that was saved at that step, the same text gives the same.
        Raises ValueError where nothing is held out, and as `loader` where documents cannot be told apart.
        """
        import torch

        from mobilellm.data.shards import read_index, read_split
        from mobilellm.eval.perplexity import Perplexity, windowed

        recipe, tokenizer, protocol = self._recipe, self.tokenizer, self.protocol(world)
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

    def protocol(self, world: World) -> dict[str, Any]:
        """How the held-out numbers of a run come about; run.json tells it."""
        from mobilellm.train.distributed import evaluation_precision

        recipe = self._recipe
        return {
            "window": recipe.batch.sequence_length,
            "document_mask": recipe.data.document_mask,
            "precision": evaluation_precision(world, recipe.compute),
            "most_tokens": recipe.data.held_out_tokens,
        }

    def speaker(self) -> Callable[[MobileLLM, int], list[tuple[str, str]]] | None:
        recipe = self._recipe
        if not recipe.sample.prompts:
            return None
        import torch

        from mobilellm.model.api import LoadedModel, generate
        from mobilellm.sampling import Sampling

        encoded = [self.tokenizer.encode(prompt) for prompt in recipe.sample.prompts]
        check_samples(recipe, encoded, self.tokenizer.vocab_size)

        def speak(model: MobileLLM, step: int) -> list[tuple[str, str]]:
            model.eval()
            loaded = LoadedModel(model, self.tokenizer, "the model in training")
            sampling = Sampling(temperature=recipe.sample.temperature, seed=recipe.seed)
            # What is compiled is training's way through the blocks; decoding has kernels of its own.
            with torch.compiler.set_stance("force_eager"):
                said = generate(loaded, recipe.sample.prompts, sampling, recipe.sample.tokens)
            model.inference_layout = None  # a copy of the weights that training has no use for
            return [(prompt, each.text) for prompt, each in zip(recipe.sample.prompts, said, strict=True)]

        return speak


def check_samples(recipe: Recipe, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
    """Raise ValueError for a prompt of `sample.prompts` that leaves no room in the model's context."""
    from mobilellm.completion import check_prompts

    config = recipe.model.config(vocab_size)
    try:
        check_prompts(prompts, config.max_position_embeddings, config.vocab_size, recipe.sample.tokens)
    except ValueError as error:
        raise ValueError(f"train: sample.prompts: {str(error).removeprefix('generate: ')}") from None


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
