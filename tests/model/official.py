"""Synthetic directories in every layout the official checkpoints are found in: random weights, tiny shapes.

No official weight, code or tokenizer is in them; names, keys, dtypes and faults are those of the originals
(docs/official-checkpoints.md).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from official_configs import OFFICIAL, as_llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 600, 36, 80, 3, 9, 3, 4

CONFIG = OFFICIAL | {
    "head_dim": HEAD_DIM,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 64,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
}
LLAMA = as_llama(CONFIG)
LAYER_SHARE = CONFIG | {"layer_sharing": True, "use_cache": False}


def random_tensors(
    dtype: torch.dtype = torch.float16, head: bool = False, seed: int = 0
) -> dict[str, Tensor]:
    """Every stored tensor of the tiny shape, by the names of the checkpoints."""
    kv_width = KV_HEADS * HEAD_DIM
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
                "self_attn.k_proj": (kv_width, HIDDEN),
                "self_attn.v_proj": (kv_width, HIDDEN),
                "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
                "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
                "mlp.up_proj": (INTERMEDIATE, HIDDEN),
                "mlp.down_proj": (HIDDEN, INTERMEDIATE),
                "input_layernorm": (HIDDEN,),
                "post_attention_layernorm": (HIDDEN,),
            }.items()
        }
    shapes["model.norm.weight"] = (HIDDEN,)
    if head:
        shapes[HEAD] = (VOCAB, HIDDEN)
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.2 + (len(shape) == 1)).to(dtype)
        for name, shape in shapes.items()
    }


def write_config(directory: Path, values: dict[str, Any]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_tokenizer(directory: Path, model: Path) -> None:
    """The two files of the originals: a tokenizer.model, and a config with empty special tokens."""
    (directory / "tokenizer.model").write_bytes(model.read_bytes())
    empty = {"bos_token": "", "eos_token": "", "unk_token": "", "tokenizer_class": "LlamaTokenizer"}
    (directory / "tokenizer_config.json").write_text(json.dumps(empty), encoding="utf-8")


def write_bin(directory: Path, tensors: dict[str, Tensor], legacy: bool = False) -> Path:
    file = directory / "pytorch_model.bin"
    torch.save(tensors, file, _use_new_zipfile_serialization=not legacy)
    return file


def write_safetensors(directory: Path, tensors: dict[str, Tensor]) -> Path:
    file = directory / "model.safetensors"
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    return file


def write_shards(directory: Path, tensors: dict[str, Tensor], count: int, safe: bool) -> list[Path]:
    """Split over `count` files with an index, as transformers does it."""
    stem, ending = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    weight_map: dict[str, str] = {}
    files = []
    for number in range(count):
        name = f"{stem}-{number + 1:05d}-of-{count:05d}.{ending}"
        part = {key: tensors[key] for key in list(tensors)[number::count]}
        weight_map |= dict.fromkeys(part, name)
        files.append(directory / name)
        if safe:
            safetensors.torch.save_file(part, files[-1], metadata={"format": "pt"})
        else:
            torch.save(part, files[-1])
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / f"{stem}.{ending}.index.json").write_text(json.dumps(index), encoding="utf-8")
    return files


def mobilellm_125m(directory: Path) -> dict[str, Tensor]:
    """Also 350M and 600M: float16 pickle, tied, nothing stored for the head. Returns the true tensors."""
    tensors = random_tensors()
    write_config(directory, CONFIG)
    write_bin(directory, tensors)
    return tensors


def bot_safetensors(directory: Path) -> dict[str, Tensor]:
    """As the conversion bot left the 125M: the embedding under the name of the head."""
    tensors = random_tensors()
    write_config(directory, CONFIG)
    write_safetensors(directory, {HEAD if name == EMBEDDING else name: t for name, t in tensors.items()})
    return tensors


def mobilellm_1b(directory: Path) -> dict[str, Tensor]:
    """bfloat16, with a separate head that is stored and that the official code never uses."""
    tensors = random_tensors(torch.bfloat16, head=True)
    write_config(directory, CONFIG | {"torch_dtype": "bfloat16"})
    write_bin(directory, tensors)
    return {name: tensor for name, tensor in tensors.items() if name != HEAD}


def mobilellm_1_5b(directory: Path) -> dict[str, Tensor]:
    """A plain Llama, bfloat16, its separate head used."""
    tensors = random_tensors(torch.bfloat16, head=True)
    write_config(directory, LLAMA)
    write_bin(directory, tensors)
    return tensors


def layer_share(directory: Path) -> dict[str, Tensor]:
    """LAYERS blocks are stored and each runs twice; the cache is switched off in the config."""
    tensors = random_tensors()
    write_config(directory, LAYER_SHARE)
    write_bin(directory, tensors)
    return tensors
