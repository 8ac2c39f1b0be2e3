"""The model an artefact is made of and compared with."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilellm import hub
from mobilellm.chat_template import stored_template
from mobilellm.config import ModelConfig
from mobilellm.export.targets import Options
from mobilellm.model import api, checkpoint
from mobilellm.model.quantized import DESCRIPTION, Origin, Quantized
from mobilellm.model.tensor_files import fingerprint
from mobilellm.model.transformer import MobileLLM
from mobilellm.tokenizer import Tokenizer


@dataclass(frozen=True)
class Source:
    """A model directory as read: its weights in the dtype they are stored in, one entry a parameter.

    Where they lie in safetensors files each is read when it is asked for, and none stays in memory.
    """

    name: str
    """What the user typed."""
    directory: Path
    config: ModelConfig
    tensors: Mapping[str, Tensor]
    tokenizer: Tokenizer
    chat_template: str | None
    repairs: tuple[str, ...]
    quantized: Quantized | None = None
    """Of a model made by `mobilellm quantize`: the codes and scales that `tensors` are the values of."""

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @cached_property
    def fingerprint(self) -> str:
        """Over weights and tokenizer: equal for equal models wherever they lie."""
        return fingerprint(self.tensors, self.tokenizer)

    @property
    def origin(self) -> Origin | None:
        """Of a quantised model, as far as it is told."""
        return None if self.quantized is None else self.quantized.origin

    @cached_property
    def tokenizer_bytes(self) -> int:
        """Of the tokenizer's files in a directory for transformers."""
        with tempfile.TemporaryDirectory() as directory:
            self.tokenizer.save(directory, model_max_length=self.config.max_position_embeddings)
            return sum(file.stat().st_size for file in Path(directory).iterdir())

    def weight(self, name: str) -> NDArray[np.float32]:
        """A parameter in float32, by its checkpoint name."""
        values: NDArray[np.float32] = self.tensors[name].to(torch.float32).numpy()
        return values

    def model(self, rounded: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor) -> MobileLLM:
        """In PyTorch, float32; `rounded` may change each parameter (name, values) on the way.

        Of a quantised model the weights alone: what it rounds before products is left as it is.
        """
        tensors = {name: rounded(name, tensor.float()) for name, tensor in self.tensors.items()}
        return checkpoint.build(checkpoint.Weights(self.config, tensors, "llama", ()), torch.float32)


def open_source(source: str | Path, say: Callable[[str], None]) -> Source:
    """A model directory, a run or a Hub id, in any layout that `mobilellm.load` reads.

    Raises ValueError and FileNotFoundError, one line each, for what is no model of ours, for weights that are
    not finite, and for a model without a tokenizer.
    """
    directory = hub.resolve(source, say)
    opened = source_of(str(source), directory, checkpoint.read_weights(directory, on_demand=True))
    for repair in opened.repairs:
        say(f"{source}: repaired: {repair}")
    return opened


def open_origin(source: Source, named: str | None, say: Callable[[str], None]) -> Source | None:
    """The model that a quantised source was made of: the one `named`, or the one that it names itself.

    None of a source that is not quantised, and where what is named is not there any more, or another model.
    Raises ValueError for a `named` one that it was not made of.
    """
    origin = source.origin
    if origin is None:
        if named is not None:
            raise ValueError(
                f"origin = {named} is for a quantised source; {source.name} does not tell what it was made of"
            )
        return None
    place = named or _named_origin(source)
    if named is None and not (place and hub.local_path(place).is_dir()):
        return None
    try:
        opened = open_source(place, lambda line: None)
    except (ValueError, OSError):
        if named is not None:
            raise
        return None
    if opened.fingerprint == origin.sha256:
        say(f"comparing with {place}, too, of which {source.name} was made")
        return opened
    if named is not None:
        raise ValueError(f"origin = {named} is not the model that {source.name} was made of")
    return None


def _named_origin(source: Source) -> str:
    """As it was typed when the source was quantised."""
    described = json.loads((source.directory / DESCRIPTION).read_text(encoding="utf-8"))
    report = described.get("report")
    return str(report.get("source", "")) if isinstance(report, dict) else ""


def source_of(name: str, directory: Path, weights: checkpoint.Weights) -> Source:
    """Weights that are in memory, with tokenizer and chat template of a model directory; `name` tells it."""
    tokenizer = api.read_tokenizer(directory, weights.config)
    if tokenizer is None:
        raise FileNotFoundError(f"{name}: has no tokenizer, and an artefact needs one to read text")
    repairs = weights.repairs + tokenizer.repairs
    template = stored_template(directory)
    return Source(
        name, directory, weights.config, weights.tensors, tokenizer, template, repairs, weights.quantized
    )


def kept_types(
    source: Source, options: Options, kind: str, names: Mapping[str, str], refusal: str
) -> Options:
    """The types of a quantised source, which nothing rounds again: `names` are what the target calls them.

    Raises ValueError, ending in `refusal` for a format that the target has no type for.
    """
    assert source.quantized is not None
    own = source.quantized.quantization
    if own.kv is not None:
        raise ValueError(
            f"{source.name}: rounds keys and values, which what runs a {kind} artefact does not; "
            "quantise without --kv"
        )
    for option, asked, has in (
        ("type", options.type, own.linear),
        ("embedding_type", options.embedding_type, own.embedding),
    ):
        if has not in names:
            raise ValueError(f"{source.name}: is quantised as {own.scheme}{refusal}")
        if asked is not None and asked.lower() != names[has].lower():
            raise ValueError(
                f"{option} = {asked} would round {source.name} again, which is {names[has]}; leave it out"
            )
    return dataclasses.replace(options, type=names[own.linear], embedding_type=names[own.embedding])


def stored_name(name: str, config: ModelConfig) -> str:
    """The parameter behind a name of the unrolled model: block n there is the block that step n runs."""
    head, layers, rest = name.partition("model.layers.")
    if not layers:
        return name
    step, _, part = rest.partition(".")
    return f"{head}{layers}{config.schedule[int(step)]}.{part}"


def growth_note(config: ModelConfig) -> str:
    """What unrolling a shared model costs, said aloud."""
    return (
        f"Unrolled: {config.num_layers} stored blocks become {config.num_steps}; what the blocks take, "
        f"stored and in memory, grows {config.repeats} times."
    )
