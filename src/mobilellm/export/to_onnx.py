"""A model as a directory that onnxruntime-genai runs, in the layout that transformers.js loads.

    genai_config.json          names the model's file, its inputs and outputs, its stop token
    onnx/model_q4.onnx         or model_int8.onnx, model.onnx: weights and graph
    config.json, generation_config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json
    chat_template.jinja        if the model has one

config.json is that of a plain Llama with a layer for every executed step: its readers want to know from it
how many pairs of keys and values to hand over.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mobilellm.config import ModelConfig
from mobilellm.export.onnx_graph import TYPE_OF, Floats, Graph, model_proto
from mobilellm.layouts import config_json
from mobilellm.tokenizer import BOS_ID, EOS_ID, PAD_ID, Tokenizer

FILE_OF = {"fp32": "model.onnx", "int8": "model_int8.onnx", "int4": "model_q4.onnx"}
"""Names by which transformers.js finds a file for its `dtype` fp32, int8, q4."""
ONE_FILE = 1_900_000_000
"""Bytes of weights that fit in the .onnx file itself: protobuf ends at 2 GB. More lie beside it."""


def write_onnx(
    directory: Path,
    config: ModelConfig,
    weight: Callable[[str], Floats],
    tokenizer: Tokenizer,
    kind: str = "int4",
    embedding_kind: str | None = None,
    chat_template: str | None = None,
) -> Graph:
    """Fill an empty directory. `kind` and `embedding_kind` (by default the same): fp32, int8 or int4.

    `weight` gives a parameter in float32 by its checkpoint name. Returns what the graph is made of.
    Raises ValueError for a kind unknown and for a model of which 32 divides no row.
    """
    embedding_kind = embedding_kind or kind
    for name in (kind, embedding_kind):
        if name not in TYPE_OF:
            raise ValueError(f"type = {name!r} is not known to onnx; choose one of {', '.join(TYPE_OF)}")
    proto, graph = model_proto(config, weight, kind, embedding_kind)
    if kind != "fp32" and not any(".layers." in name for name in graph.quantised):
        raise ValueError(
            f"type = {kind}: stores blocks of 32 numbers, and 32 divides neither hidden_size = "
            f"{config.hidden_size} nor intermediate_size = {config.intermediate_size}; take fp32"
        )
    external = _write_model(proto, directory / "onnx" / FILE_OF[kind])
    _write_json(directory / "genai_config.json", _genai_config(config, kind))
    _write_json(directory / "config.json", _javascript_config(config, kind, external))
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    _write_json(directory / "generation_config.json", ids)
    tokenizer.save(directory, model_max_length=config.max_position_embeddings)
    if chat_template is not None:
        (directory / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    return graph


def _write_model(proto: Any, file: Path) -> bool:
    """Write the .onnx file; whether its weights lie beside it, in NAME.onnx_data."""
    import onnx

    file.parent.mkdir()
    external = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > ONE_FILE
    onnx.save_model(
        proto, str(file), save_as_external_data=external, location=f"{file.name}_data", size_threshold=1024
    )
    return external


def _genai_config(config: ModelConfig, kind: str) -> dict[str, Any]:
    return {
        "model": {
            "type": "llama",
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
            "pad_token_id": PAD_ID,
            "context_length": config.max_position_embeddings,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": f"onnx/{FILE_OF[kind]}",
                "head_size": config.head_dim,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_heads,
                "num_key_value_heads": config.num_kv_heads,
                "num_hidden_layers": config.num_steps,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {
            "do_sample": False,
            "max_length": config.max_position_embeddings,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": True,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def _javascript_config(config: ModelConfig, kind: str, external: bool) -> dict[str, Any]:
    values = config_json(config.unrolled(), "llama", "float32")
    dtype = {"fp32": "fp32", "int8": "int8", "int4": "q4"}[kind]
    values["transformers.js_config"] = {"dtype": dtype, "kv_cache_dtype": "float32"}
    if external:
        values["transformers.js_config"]["use_external_data_format"] = {FILE_OF[kind]: 1}
    return values


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
