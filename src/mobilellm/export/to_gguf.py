"""A model as one .gguf file, for this package's runtime and for llama.cpp and all that is built on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mobilellm import gguf_model
from mobilellm.config import ModelConfig
from mobilellm.export.arithmetic import Rounding, rounded_logits
from mobilellm.export.check import Check, count_check
from mobilellm.export.engine_runtime import engine_runtime
from mobilellm.export.llama_cpp_runtime import llama_cpp_runtime
from mobilellm.export.ollama import modelfile
from mobilellm.export.questions import Floats
from mobilellm.export.source import Source, growth_note, kept_types, stored_name
from mobilellm.export.targets import KINDS, Inventory, Opener, Options, Stored
from mobilellm.gguf import read_gguf
from mobilellm.gguf_blocks import TYPES, BlockType
from mobilellm.gguf_model import FILE_TYPES, SHARED, Roles, interleaved, layout
from mobilellm.quant.formats import FORMATS
from mobilellm.quant.schemes import EMBEDDING_NAMES
from mobilellm.runtime.reference import round_to_8_bits
from mobilellm.tokenizer import EOS_ID

_WORST_ROW = 2.0
"""A calibrated method trades errors between weights: a row may be further off than rounding leaves it."""


_REFUSAL = ", which GGUF has no type for; quantise its source with --scheme q4_0 or q8_0"


class GgufTarget:
    """See `Target`."""

    kind = KINDS["gguf"]

    def complete(self, options: Options, source: Source) -> Options:
        """A model quantised in GGUF's formats keeps its own."""
        if source.quantized is not None:
            return kept_types(
                source, options, self.kind.name, {name.lower(): name for name in TYPES}, _REFUSAL
            )
        kind = _type(options.type or "Q8_0").name
        return dataclasses.replace(
            options, type=kind, embedding_type=_type(options.embedding_type or kind).name
        )

    def write(self, source: Source, path: Path, options: Options) -> list[str]:
        config = _config(source, options)
        wider = gguf_model.write_model(
            path, config, _stored_weights(source, options), source.tokenizer, _roles(options),
            source.directory.name, source.chat_template,
        )  # fmt: skip
        notes = []
        for reason in dict.fromkeys(wider.values()):
            first, *more = [name for name, told in wider.items() if told == reason]
            many = f"{first} and {len(more)} more are" if more else f"{first} is"
            notes.append(f"{many} stored as F16: {reason}")
        if config.shares_layers:
            notes.append(
                "Blocks are shared: this package runs the file, llama.cpp refuses it. "
                "For llama.cpp: --unroll."
            )
        elif source.config.shares_layers:
            notes.append(growth_note(source.config))
        return notes

    def options_of(self, path: Path, source: Source) -> Options:
        """Types of the matrices: of the blocks what the metadata says, of the embedding what is there."""
        file = read_gguf(path)
        names = {number: name for name, number in FILE_TYPES.items()}
        stated = file.metadata.get("general.file_type")
        if stated not in names:
            raise ValueError(f"{path}: general.file_type = {stated!r}; this package writes none such")
        embedding = file.tensors.get("token_embd.weight")
        return Options(
            type=names[stated],
            embedding_type=embedding.type.name if embedding else names[stated],
            unroll=source.config.shares_layers and file.metadata["general.architecture"] != SHARED,
        )

    def expected(self, source: Source, options: Options) -> Inventory:
        config = _config(source, options)
        planned = [stored for _, stored in layout(config, _roles(options))]
        tokens = sum(len(piece.encode()) + 16 for piece in source.tokenizer.pieces)  # length, score, kind
        tokens += 32 * (config.vocab_size - source.tokenizer.vocab_size)
        names = sum(len(stored.name) + 8 + 4 + 8 * len(stored.shape) + 12 for stored in planned)
        weights = sum(-(-stored.type.nbytes(stored.shape) // 32) * 32 for stored in planned)
        template = len((source.chat_template or "").encode())
        return Inventory(
            config,
            {stored.name: Stored(stored.shape, stored.type.name) for stored in planned},
            frozenset({EOS_ID}),
            weights + names + tokens + template,
        )

    def inventory(self, path: Path) -> Inventory:
        file = read_gguf(path)
        stop = file.metadata.get("tokenizer.ggml.eos_token_id")
        return Inventory(
            gguf_model.stated_config(file),
            {name: Stored(info.shape, info.type.name) for name, info in file.tensors.items()},
            frozenset({stop} if isinstance(stop, int) else ()),
            path.stat().st_size,
        )

    def reference(self, source: Source, options: Options) -> Callable[[Sequence[int]], Floats]:
        """Weights to the file's types and back; inputs of a matrix in blocks to 8 bits, as reference.py."""
        types = {name: stored.type for name, stored in layout(source.config, _roles(options))}

        def rounded(name: str, values: Tensor) -> Tensor:
            if source.quantized is not None and name in source.quantized.matrices:
                return values
            return torch.from_numpy(_rounded(types[name], values.numpy()))

        model = source.model(rounded)
        in_blocks = {name for name, kind in types.items() if kind.block > 1}

        def inputs(name: str) -> Rounding | None:
            return _to_8_bits if name in in_blocks else None

        return lambda tokens: rounded_logits(model, tokens, inputs)

    def checks(self, path: Path, source: Source, options: Options) -> list[Check]:
        file = read_gguf(path)
        weights = _weights(source, options)
        config = _config(source, options)
        exact = source.quantized is not None
        turned: list[str] = []
        worst, where = 0.0, ""
        for checkpoint_name, stored in layout(config, _roles(options)):
            if stored.name not in file.tensors or file.tensors[stored.name].shape != stored.shape:
                continue  # the check of the tensors names it
            there, given = file.array(stored.name), weights(checkpoint_name)
            wanted = given
            if stored.name.endswith(("attn_q.weight", "attn_k.weight")):
                wanted = interleaved(given, config.head_dim)
                if _distance(there, wanted) > _distance(there, given):
                    turned.append(f"{stored.name}: its rows lie half a head apart")
                    wanted = given
            excess, row = _worst_row(there, wanted, TYPES["F32"] if exact else stored.type)
            if excess > worst:
                worst, where = excess, f"{stored.name}, row {row}"
        return [
            count_check("rotary layout", "matrices", turned, "rows of q and k lie pair by pair"),
            Check("weights", worst, _WORST_ROW, "times the error of rounding", where),
        ]

    def beside(self, name: str, source: Source, options: Options) -> Mapping[str, str]:
        """With `ollama`, NAME.Modelfile, and the chat template where there is one."""
        if not options.ollama:
            return {}
        config = _config(source, options)
        if config.shares_layers:
            raise ValueError("ollama = True: Ollama knows no shared blocks; add --unroll")
        stem = name.removesuffix(".gguf")
        texts = {f"{stem}.Modelfile": modelfile(name, config, source.chat_template)}
        if source.chat_template is not None:
            texts[f"{stem}.chat_template.jinja"] = source.chat_template
        return texts

    def runtimes(self, path: Path) -> Mapping[str, Opener]:
        shared = gguf_model.stated_config(read_gguf(path)).shares_layers
        return {"engine": engine_runtime} | ({} if shared else {"llama.cpp": llama_cpp_runtime})


TARGET = GgufTarget()


def _type(name: str) -> BlockType:
    if name.upper() not in TYPES:
        raise ValueError(f"type = {name!r} is not known; choose one of {', '.join(TYPES)}")
    return TYPES[name.upper()]


def _roles(options: Options) -> Roles:
    assert options.type is not None
    return Roles(_type(options.type), _type(options.embedding_type or options.type))


def _config(source: Source, options: Options) -> ModelConfig:
    return source.config.unrolled() if options.unroll else source.config


def _weights(source: Source, options: Options) -> Callable[[str], NDArray[np.float32]]:
    """Every parameter's values by the name it has in the file's model."""
    if not options.unroll:
        return source.weight
    return lambda name: source.weight(stored_name(name, source.config))


def _stored_weights(
    source: Source, options: Options
) -> Callable[[str], NDArray[np.float32] | NDArray[np.uint8]]:
    """The same; of a quantised model a matrix's bytes in the file, which are not rounded again."""
    values, quantized = _weights(source, options), source.quantized
    if quantized is None:
        return values

    def weight(name: str) -> NDArray[np.float32] | NDArray[np.uint8]:
        parameter = stored_name(name, source.config) if options.unroll else name
        if (matrix := quantized.matrices.get(parameter)) is None:
            return values(name)
        own = quantized.quantization
        return FORMATS[own.embedding if name in EMBEDDING_NAMES else own.linear].file_bytes(matrix)

    return weight


def _rounded(kind: BlockType, values: NDArray[np.float32]) -> NDArray[np.float32]:
    return kind.decode(kind.encode(values), values.shape)


def _to_8_bits(x: Tensor) -> Tensor:
    return torch.from_numpy(round_to_8_bits(x.reshape(-1, x.shape[-1]).numpy())).view(x.shape)


def _distance(a: Floats, b: Floats) -> float:
    return float(np.square(a - b, dtype=np.float64).sum())


def _worst_row(there: Floats, wanted: Floats, kind: BlockType) -> tuple[float, int]:
    """The row furthest from the source, in units of what rounding to the nearest costs it, and its number."""
    there, wanted = np.atleast_2d(there), np.atleast_2d(wanted)
    rounding = np.linalg.norm(_rounded(kind, wanted) - wanted, axis=1)
    unit = rounding + 1e-5 * np.linalg.norm(wanted, axis=1) + 1e-12
    errors = np.linalg.norm(there - wanted, axis=1) / unit
    return float(errors.max()), int(errors.argmax())
