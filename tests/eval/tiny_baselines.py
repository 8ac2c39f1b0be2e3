"""A tiny random model, with a small tokenizer, of every architecture that evaluations meet: `make`.

The published baselines are OPT (125M without, 350M with a projection after the embedding), GPT-Neo, Pythia
(GPT-NeoX), RWKV, BLOOM, Qwen1.5 (Qwen2), Falcon-RW (ALiBi; the larger ones are laid out in two other ways), LaMini
(GPT-2), and TinyLlama and MobiLlama (Llama). Weights are large, so that a wrong position, mask or head shows.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mobilellm.config import ModelConfig
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.tokenizer import Tokenizer

CONTEXT = 96
VOCABULARY = 320
"""Tokens of every tokenizer; the embeddings have `ROWS`, as most published ones have some to spare."""
ROWS = 328
END = "<|endoftext|>"
TEXT = "\n\n".join(topics[name] for name in sorted(topics))[:60_000]

Config = transformers.PreTrainedConfig


def make(architecture: str, directory: Path, seed: int = 0) -> Path:
    """Write the model of one of `ARCHITECTURES` as a model directory, and return it."""
    if architecture in OURS:
        make_ours(directory, seed, repeats=2 if architecture.endswith("shared") else 1)
        return directory
    config, words = STOCK[architecture](), tokenizer(architecture)
    config.bos_token_id, config.eos_token_id = words.bos_token_id, words.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():  # biases and norms are 0 and 1 otherwise
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.2)
                elif "embed_positions" in name or "wpe" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
    model.save_pretrained(directory)
    words.save_pretrained(directory)
    return directory


def tokenizer(architecture: str) -> transformers.PreTrainedTokenizerFast:
    """Byte-level, as the published ones are. OPT puts </s> in front by itself, the Llama <s>, others nothing."""
    first = {"opt": "</s>", "opt-projected": "</s>", "llama": "<s>"}.get(architecture)
    names = {"bos_token": first, "eos_token": "</s>"} if first else {"eos_token": END}
    if architecture == "bloom":
        names = {"bos_token": "<s>", "eos_token": "</s>"}  # and yet puts nothing in front
    backend = Backend.from_str(_trained())
    if first:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, backend.token_to_id(first))]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


@cache
def _trained() -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END, "<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    assert backend.get_vocab_size() == VOCABULARY
    return backend.to_str()


@cache
def _our_tokenizer() -> Tokenizer:
    return Tokenizer.train([TEXT], VOCABULARY + 32)


def make_ours(
    directory: Path, seed: int = 0, layout: str = "mobilellm", repeats: int = 1, context: int = CONTEXT
) -> None:
    """A tiny random model of ours with its tokenizer."""
    config = ModelConfig(
        vocab_size=_our_tokenizer().vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_position_embeddings=context,
        rope_theta=10_000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        repeats=repeats,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MobileLLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn_like(parameter) * 0.2
                parameter.copy_(noise + (parameter.ndim == 1))
    checkpoint.save(directory, model, _our_tokenizer(), layout=layout)


def edit_config(directory: Path, **changes: Any) -> None:
    """Set keys of a config.json; None removes one."""
    file = directory / "config.json"
    values = json.loads(file.read_text(encoding="utf-8")) | changes
    kept = {key: value for key, value in values.items() if value is not None}
    file.write_text(json.dumps(kept), encoding="utf-8")


def _opt(**options: Any) -> Config:
    return transformers.OPTConfig(
        vocab_size=ROWS,
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        init_std=0.2,
        **options,
    )


def _gpt_neo() -> Config:
    return transformers.GPTNeoConfig(
        vocab_size=ROWS,
        hidden_size=32,
        num_layers=2,
        attention_types=[[["global", "local"], 1]],
        num_heads=4,
        intermediate_size=48,
        window_size=8,  # shorter than the texts of the tests
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )


def _gpt_neox() -> Config:
    return transformers.GPTNeoXConfig(
        vocab_size=ROWS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
    )


def _gpt2() -> Config:
    return transformers.GPT2Config(
        vocab_size=ROWS, n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
    )


def _qwen2() -> Config:
    return transformers.Qwen2Config(**_like_llama(), tie_word_embeddings=True)


def _llama() -> Config:
    return transformers.LlamaConfig(**_like_llama(), tie_word_embeddings=False)


def _like_llama() -> dict[str, Any]:
    return {
        "vocab_size": ROWS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.2,
    }


def _bloom() -> Config:
    return transformers.BloomConfig(
        vocab_size=ROWS, hidden_size=32, n_layer=2, n_head=4, seq_length=CONTEXT, initializer_range=0.2
    )


def _falcon(**options: Any) -> Config:
    return transformers.FalconConfig(
        vocab_size=ROWS,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        **options,
    )


def _rwkv() -> Config:
    return transformers.RwkvConfig(
        vocab_size=ROWS, context_length=CONTEXT, hidden_size=32, num_hidden_layers=2, intermediate_size=48
    )


STOCK: dict[str, Callable[[], Config]] = {
    "opt": _opt,
    "opt-projected": lambda: _opt(word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt-neo": _gpt_neo,
    "gpt-neox": _gpt_neox,
    "gpt2": _gpt2,
    "qwen2": _qwen2,
    "rwkv": _rwkv,
    "bloom": _bloom,
    "llama": _llama,
    "falcon": lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon-7b": lambda: _falcon(multi_query=True, parallel_attn=True),
    "falcon-rw": lambda: _falcon(alibi=True, multi_query=False, parallel_attn=False, bias=True),
}
OURS = ("mobilellm", "mobilellm-shared")
ARCHITECTURES = (*STOCK, *OURS)
