"""A teacher by what a person types: a model of ours, a .gguf file, or any causal model of transformers.

The training loop knows none of the rooms that open them; the command line hands it a `Teacher`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mobilellm.installation import install_command, missing_packages
from mobilellm.train.teacher_cost import TeacherShape, inference_bytes, shape_of

if TYPE_CHECKING:
    from mobilellm.eval.causal_network import CausalNetwork
    from mobilellm.model.api import LoadedModel
    from mobilellm.runtime.session import RuntimeModel
    from mobilellm.tokenizer import Tokenizer
    from mobilellm.train.teacher import Teacher

Say = Callable[[str], None]


def open_teacher(
    source: str, dtype: str | None, device: torch.device, tokenizer: Tokenizer, say: Say
) -> Teacher:
    """`dtype` is by default float32. A .gguf file runs on the CPU, as it is stored.

    Raises ValueError, FileNotFoundError or ImportError with one line, also for another tokenizer than
    `tokenizer`.
    """
    if source.endswith(".gguf"):
        return _gguf(source, dtype, tokenizer, say)
    from mobilellm import hub
    from mobilellm.config import ConfigError
    from mobilellm.model_directory import read_config_file

    dtype = dtype or "float32"
    directory = hub.resolve(source, say)
    _check_tokenizer(source, _tokenizer(source, directory), tokenizer)
    try:
        read_config_file(directory)
    except ConfigError as error:
        return _through_transformers(source, directory, dtype, device, tokenizer, str(error), say)
    from mobilellm.model.api import load

    return _Ours(load(source, dtype, str(device), say=say), source)


def look_at_teacher(source: str, dtype: str | None, tokenizer: Tokenizer | None, say: Say) -> TeacherShape:
    """What a teacher is, without running it: for a plan.

    Raises what `open_teacher` raises; where the tokenizer of the data is not known yet, not for another one.
    """
    if source.endswith(".gguf"):
        return _look_at_gguf(source, dtype, tokenizer)
    from mobilellm import hub
    from mobilellm.config import ConfigError
    from mobilellm.model import checkpoint
    from mobilellm.model_directory import read_config_file

    directory = hub.resolve(source, say)
    theirs = _tokenizer(source, directory)
    if tokenizer is not None:
        _check_tokenizer(source, theirs, tokenizer)
    width = checkpoint.torch_dtype(dtype or "float32").itemsize
    try:
        read_config_file(directory)
    except ConfigError as error:
        return _look_through_transformers(source, directory, width, theirs.vocab_size, str(error))
    config = checkpoint.read_weights(directory).config
    return shape_of(source, config, theirs.vocab_size, inference_bytes(config, width))


def _look_at_gguf(source: str, dtype: str | None, tokenizer: Tokenizer | None) -> TeacherShape:
    from mobilellm import gguf_model, gguf_tokenizer
    from mobilellm.gguf import read_gguf

    _check_dtype_of_gguf(source, dtype)
    file = read_gguf(source)
    theirs = gguf_tokenizer.read_tokenizer(file)
    if tokenizer is not None:
        _check_tokenizer(source, theirs, tokenizer)
    size = sum(tensor.nbytes for tensor in file.tensors.values())
    return shape_of(source, gguf_model.read_config(file), theirs.vocab_size, size, runs_beside=True)


def _check_dtype_of_gguf(source: str, dtype: str | None) -> None:
    if dtype is not None:
        raise ValueError(
            f"distill.dtype = {dtype} does not go with {source}, which runs as it is stored; leave it out"
        )


def _gguf(source: str, dtype: str | None, tokenizer: Tokenizer, say: Say) -> Teacher:
    from mobilellm.runtime.session import load

    _check_dtype_of_gguf(source, dtype)
    runtime = load(source, say=say)
    _check_tokenizer(source, runtime.tokenizer, tokenizer)
    return _OfRuntime(runtime, source)


def _tokenizer(source: str, directory: Path) -> Tokenizer:
    from mobilellm.tokenizer import Tokenizer

    try:
        return Tokenizer.load(directory)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"distill.teacher = {source}: has no tokenizer.json or tokenizer.model, so nobody knows what its "
            "tokens are; put one beside the weights"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"distill.teacher = {source}: has another kind of tokenizer than the data ({error}); choose a "
            "teacher with the same one"
        ) from None


def _check_tokenizer(source: str, theirs: Tokenizer, ours: Tokenizer) -> None:
    if theirs.fingerprint != ours.fingerprint:
        sizes = f"{theirs.vocab_size:,} tokens there, {ours.vocab_size:,} here"
        raise ValueError(
            f"distill.teacher = {source}: has another tokenizer than the data ({sizes}), so its tokens are "
            "not the student's; choose a teacher with the same one, or prepare the data with the teacher's"
        )


def _through_transformers(
    source: str, directory: Path, dtype: str, device: torch.device, tokenizer: Tokenizer, why: str, say: Say
) -> Teacher:
    _check_transformers(source, why)
    from mobilellm.eval.causal_network import CausalNetwork
    from mobilellm.eval.transformers_loading import load_whole
    from mobilellm.model.checkpoint import torch_dtype

    loaded = load_whole(directory, torch_dtype(dtype), str(device), None, False, source, say)
    model = loaded.model
    network = CausalNetwork(model, source, model.get_input_embeddings().weight.shape[0])
    return _OfTransformers(source, loaded.fingerprint, dtype, device, model, network, tokenizer.vocab_size)


def _check_transformers(source: str, why: str) -> None:
    if missing := missing_packages("transformers"):
        raise ImportError(
            f"distill.teacher = {source}: only transformers can run it ({why}); that package is not "
            f"installed; install it with: {install_command('hf')}",
            name=missing[0],
        )


def _look_through_transformers(
    source: str, directory: Path, width: int, vocab_size: int, why: str
) -> TeacherShape:
    """By the shape that its configuration gives; nothing of it is loaded."""
    _check_transformers(source, why)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(directory))
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of any model's code
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"distill.teacher = {source}: transformers cannot load it: {reason}") from None
    parameters = sum(weight.numel() for weight in model.parameters())
    embedding = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", embedding)
    others = parameters - embedding.numel() - (0 if head is embedding else head.numel())
    hidden, layers = int(embedding.shape[1]), int(getattr(config, "num_hidden_layers", 0))
    stated = getattr(config, "max_position_embeddings", None)
    return TeacherShape(
        name=source,
        vocab_size=vocab_size,
        context=stated if isinstance(stated, int) and stated > 0 else 2**31,
        parameters=parameters,
        in_blocks=others,
        in_head=int(head.numel()),
        flops_per_pair=4 * layers * hidden,
        weights_bytes=width * parameters,
        widths=(hidden, int(getattr(config, "intermediate_size", 4 * hidden))),
    )


class _Ours:
    def __init__(self, loaded: LoadedModel, source: str) -> None:
        from mobilellm.eval.torch_model import fingerprint

        model = loaded.model.eval()
        assert loaded.tokenizer is not None  # it was read before
        self.name, self.fingerprint = source, fingerprint(model, loaded.tokenizer)
        self.dtype = str(model.head_weight.dtype).removeprefix("torch.")
        self.device = model.head_weight.device
        self.context, self.vocab_size = model.config.max_position_embeddings, loaded.tokenizer.vocab_size
        self._model = model

    def states(self, tokens: Tensor, places: Tensor) -> Tensor:
        from mobilellm.model.fused import fuse
        from mobilellm.model.scoring import states_at

        self._model.inference_layout = fused = fuse(self._model, reuse=self._model.inference_layout)
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        return states_at(self._model, fused, tokens, positions, None, places)

    def logits(self, states: Tensor) -> Tensor:
        return self._model.logits(states, self._model.inference_layout)


class _OfTransformers:
    def __init__(
        self,
        name: str,
        fingerprint: str,
        dtype: str,
        device: torch.device,
        model: Any,
        network: CausalNetwork,
        vocab_size: int,
    ) -> None:
        self.name, self.fingerprint, self.dtype, self.device = name, fingerprint, dtype, device
        self._network, self.vocab_size = network, vocab_size
        if network.vocabulary < vocab_size:
            raise ValueError(
                f"distill.teacher = {name}: gives logits of {network.vocabulary} tokens, its tokenizer has "
                f"{vocab_size}; choose another teacher"
            )
        stated = getattr(model.config, "max_position_embeddings", None)
        self.context: int = stated if isinstance(stated, int) and stated > 0 else 2**31

    def states(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self._network.states(tokens).flatten(0, 1)[places]

    def logits(self, states: Tensor) -> Tensor:
        return self._network.logits(states)


class _OfRuntime:
    """One sequence after the other."""

    device = torch.device("cpu")

    def __init__(self, model: RuntimeModel, source: str) -> None:
        with Path(source).open("rb") as file:
            self.fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
        self.name, self.dtype = source, "as stored"
        self.context = model.engine.config.max_position_embeddings
        self.vocab_size = model.tokenizer.vocab_size
        self._engine = model.engine

    def states(self, tokens: Tensor, places: Tensor) -> Tensor:
        from mobilellm.runtime.generation import PREFILL_CHUNK

        B, T = tokens.shape
        wanted = places.view(-1)
        found = []
        for number in range(B):
            inside = wanted[(wanted >= number * T) & (wanted < (number + 1) * T)] - number * T
            length = int(inside.max()) + 1
            row, cache = tokens[number, :length].numpy(), self._engine.new_cache(length)
            parts = [
                torch.from_numpy(self._engine.forward(row[start : start + PREFILL_CHUNK], cache).copy())
                for start in range(0, length, PREFILL_CHUNK)
            ]
            found.append(torch.cat(parts)[inside])
        return torch.cat(found)

    def logits(self, states: Tensor) -> Tensor:
        return torch.from_numpy(self._engine.logits(states.numpy()))
