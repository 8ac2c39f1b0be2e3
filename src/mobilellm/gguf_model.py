"""A model in GGUF: tensors and metadata, written with the `gguf` package and read back strictly.

A model without layer sharing is an ordinary "llama" that llama.cpp and all that build on it run. A shared one
stores every block once and names its architecture "mobilellm", so that a reader which does not know how often
to run a block refuses the file. As llama.cpp wants it, rows of q and k are permuted: of every head the pairs
that rotate together lie side by side (2i, 2i + 1), where Llama checkpoints have them half a head apart.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobilellm import gguf_tokenizer
from mobilellm.atomic import atomic_write
from mobilellm.config import ConfigError, ModelConfig
from mobilellm.gguf import GGUF, shown
from mobilellm.gguf_blocks import TYPES, BlockType
from mobilellm.texts import Texts
from mobilellm.tokenizer import Tokenizer

PLAIN, SHARED = "llama", "mobilellm"

_BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FIELDS = {  # key after the architecture's name -> field of ModelConfig
    "vocab_size": "vocab_size",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "block_count": "num_layers",
    "attention.head_count": "num_heads",
    "attention.head_count_kv": "num_kv_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "rope.freq_base": "rope_theta",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_REPEATS, _ORDER = f"{SHARED}.layer_sharing.repeats", f"{SHARED}.layer_sharing.order"
_MOST = {"num_heads": 1024, "num_steps": 2**16, "max_position_embeddings": 2**30}
_ROTATED = ("attn_q.weight", "attn_k.weight")
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "BF16": 32}  # llama.cpp's names for whole files


class Roles(NamedTuple):
    """The types of the matrices: those of the blocks, and the embedding with the head."""

    linear: BlockType
    embedding: BlockType


_FLOATS = Roles(TYPES["F32"], TYPES["F32"])


class Stored(NamedTuple):
    name: str
    shape: tuple[int, ...]
    type: BlockType


def layout(config: ModelConfig, roles: Roles = _FLOATS) -> Iterator[tuple[str, Stored]]:
    """(Llama checkpoint name, what is stored) of every tensor, in the order in which a token reads them.

    Norms are F32. A matrix whose rows the type's blocks do not divide is stored as F16 instead.
    """
    E, V, F = config.hidden_size, config.vocab_size, config.intermediate_size
    Q, KV = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "input_layernorm": (E,), "self_attn.q_proj": (Q, E), "self_attn.k_proj": (KV, E),
        "self_attn.v_proj": (KV, E), "self_attn.o_proj": (E, Q), "post_attention_layernorm": (E,),
        "mlp.gate_proj": (F, E), "mlp.up_proj": (F, E), "mlp.down_proj": (E, F),
    }  # fmt: skip
    yield "model.embed_tokens.weight", Stored("token_embd.weight", (V, E), _fitting(roles.embedding, E))
    for block in range(config.num_layers):
        for part, short in _BLOCK_NAMES.items():
            shape = shapes[part]
            kind = TYPES["F32"] if len(shape) == 1 else _fitting(roles.linear, shape[-1])
            yield f"model.layers.{block}.{part}.weight", Stored(f"blk.{block}.{short}.weight", shape, kind)
    yield "model.norm.weight", Stored("output_norm.weight", (E,), TYPES["F32"])
    if not config.tie_word_embeddings:
        yield "lm_head.weight", Stored("output.weight", (V, E), _fitting(roles.embedding, E))


def write_model(
    path: str | Path,
    config: ModelConfig,
    weight: Callable[[str], NDArray[np.float32] | NDArray[np.uint8]],
    tokenizer: Tokenizer,
    roles: Roles,
    name: str,
    chat_template: str | None = None,
) -> dict[str, str]:
    """Write a file; it appears whole or not at all. `weight` gives a tensor by its checkpoint name.

    It may give a matrix as uint8, the bytes of every row in its type: they are written as they are.

    Returns the tensors that stayed in a wider type than their role's, and why. Raises ValueError for a
    tokenizer that does not fit.
    """
    import gguf

    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} pieces and the model's vocabulary {config.vocab_size}"
        )
    architecture = SHARED if config.shares_layers else PLAIN
    wider = {}
    with atomic_write(path) as temporary, _full_disks_told():
        writer = gguf.GGUFWriter(temporary, architecture)
        writer.add_name(name)
        writer.add_quantization_version(2)
        writer.add_file_type(FILE_TYPES[roles.linear.name])
        for key, field in _FIELDS.items():
            value = getattr(config, field)
            add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
            add(f"{architecture}.{key}", value)
        writer.add_uint32(f"{architecture}.attention.value_length", config.head_dim)
        writer.add_uint32(f"{architecture}.rope.dimension_count", config.head_dim)
        if config.shares_layers:
            writer.add_uint32(_REPEATS, config.repeats)
            writer.add_string(_ORDER, config.order)
        gguf_tokenizer.add_tokenizer(writer, tokenizer, config.vocab_size, chat_template)
        planned = list(layout(config, roles))
        for _, stored in planned:
            role = roles.embedding if stored.name in ("token_embd.weight", "output.weight") else roles.linear
            if len(stored.shape) == 2 and stored.type != role:
                wider[stored.name] = (
                    f"rows of {stored.shape[-1]} are no multiple of {role.name}'s {role.block}"
                )
            writer.add_tensor_info(
                stored.name, _bytes_shape(stored), np.dtype(np.uint8), stored.type.nbytes(stored.shape),
                gguf.GGMLQuantizationType(stored.type.number),
            )  # fmt: skip
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for checkpoint_name, stored in planned:
            values = weight(checkpoint_name)
            encoded = values.dtype == np.uint8
            shape = _bytes_shape(stored) if encoded else stored.shape
            if values.shape != shape:
                raise ValueError(f"{checkpoint_name}: has shape {values.shape}, expected {shape}")
            if stored.name.endswith(_ROTATED):
                values = interleaved(values, config.head_dim)
            writer.write_tensor_data(values if encoded else stored.type.encode(values))
        writer.close()
    return wider


def read_config(file: GGUF) -> ModelConfig:
    """The model's shape, checked with the tensors that are there. Raises ValueError with one line."""
    config = stated_config(file)
    _check_tensors(file, config)
    _check_rope(file, file.metadata["general.architecture"], config)
    return config


def stated_config(file: GGUF) -> ModelConfig:
    """The shape as the metadata tells it, whatever tensors are there. Raises ValueError with one line."""
    architecture = file.metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in (PLAIN, SHARED):
        raise ValueError(
            f"{file.path}: its architecture is {shown(architecture)}; {PLAIN} and {SHARED} are run here"
        )
    values = {
        field: _of(file, f"{architecture}.{key}")
        for key, field in _FIELDS.items()
        if _has(file, architecture, key)
    }
    tokens = file.metadata.get("tokenizer.ggml.tokens")
    if isinstance(tokens, Texts):
        values.setdefault("vocab_size", len(tokens))
    hidden, heads = values.get("hidden_size"), values.get("num_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads:
        values.setdefault("head_dim", hidden // heads)
        values.setdefault("num_kv_heads", heads)
    if architecture == SHARED:
        values["repeats"], values["order"] = _of(file, _REPEATS), _of(file, _ORDER)
    try:
        config = ModelConfig.from_dict({**values, "tie_word_embeddings": "output.weight" not in file.tensors})
    except (ConfigError, TypeError) as error:
        raise ValueError(f"{file.path}: {error}") from None
    for name, most in _MOST.items():  # far above every model: what would take memory that the file does not
        if getattr(config, name) > most:
            raise ValueError(f"{file.path}: {name} = {getattr(config, name)} is more than {most:,}")
    return config


def read_weight(file: GGUF, config: ModelConfig, checkpoint_name: str) -> NDArray[np.float32]:
    """A tensor by its checkpoint name, as `write_model` was given it but for the rounding of its type."""
    name = dict(layout(config))[checkpoint_name].name
    values = file.array(name)
    return _half_apart(values, config.head_dim) if name.endswith(_ROTATED) else values


@contextmanager
def _full_disks_told() -> Iterator[None]:
    """numpy writes less than it was given and keeps the reason to itself."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            raise
        raise OSError(errno.EIO, "could not be written whole; is the disk full?") from None


def _fitting(kind: BlockType, row: int) -> BlockType:
    return kind if row % kind.block == 0 else TYPES["F16"]


def _bytes_shape(stored: Stored) -> tuple[int, ...]:
    """The shape in bytes, from which the gguf package works out the numbers' own."""
    *rows, row = stored.shape
    return (*rows, stored.type.nbytes((row,)))


def interleaved(values: NDArray[Any], head_dim: int) -> NDArray[Any]:
    rows, columns = values.shape
    heads = values.reshape(rows // head_dim, 2, head_dim // 2, columns)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows, columns)


def _half_apart(values: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """The inverse of `interleaved`."""
    rows, columns = values.shape
    heads = values.reshape(rows // head_dim, head_dim // 2, 2, columns)
    return np.ascontiguousarray(heads.swapaxes(1, 2)).reshape(rows, columns)


def _has(file: GGUF, architecture: str, key: str) -> bool:
    return f"{architecture}.{key}" in file.metadata


def _of(file: GGUF, key: str) -> Any:
    value = file.metadata.get(key)
    if value is None or isinstance(value, np.ndarray | Texts) or (isinstance(value, str) and len(value) > 80):
        raise ValueError(f"{file.path}: the metadata has no single value {key!r}; the file is incomplete")
    return value


def _check_tensors(file: GGUF, config: ModelConfig) -> None:
    if config.num_layers > len(file.tensors):  # before anything as long as that is made
        raise ValueError(
            f"{file.path}: says it has {config.num_layers} blocks and has {len(file.tensors)} tensors"
        )
    wanted = {stored.name: stored.shape for _, stored in layout(config)}
    for name, shape in wanted.items():
        if name not in file.tensors:
            raise ValueError(f"{file.path}: the tensor {name!r} is missing")
        if file.tensors[name].shape != shape:
            raise ValueError(
                f"{file.path}: the tensor {name!r} has shape {list(file.tensors[name].shape)}, expected "
                f"{list(shape)}"
            )
    if extra := sorted(file.tensors.keys() - wanted.keys()):
        raise ValueError(
            f"{file.path}: holds {extra[0]!r}, which is no part of the model; it would be run wrong"
        )


def _check_rope(file: GGUF, architecture: str, config: ModelConfig) -> None:
    for key, value in file.metadata.items():
        if not key.startswith(f"{architecture}.rope.scaling"):
            continue
        if isinstance(value, np.ndarray | Texts) or value not in ("none", 0, 1, 1.0):
            raise ValueError(f"{file.path}: {shown(key)} = {shown(value)} is not implemented")
    turned = file.metadata.get(f"{architecture}.rope.dimension_count", config.head_dim)
    if isinstance(turned, np.ndarray | Texts) or turned != config.head_dim:
        raise ValueError(
            f"{file.path}: rotates {shown(turned)} of {config.head_dim} numbers of a head; all or none is run"
        )
