"""What lies beside the graph of an ONNX export, for the runtimes that read the directory.

    genai_config.json          names the model's file, its inputs and outputs, its stop token
    config.json, generation_config.json, tokenizer.json, tokenizer_config.json, special_tokens_map.json
    chat_template.jinja        if the model has one

config.json is that of a plain Llama with a layer for every executed step: its readers want to know from it
how many pairs of keys and values to hand over.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mobilellm.config import ModelConfig
from mobilellm.export.source import Source
from mobilellm.layouts import config_json
from mobilellm.tokenizer import BOS_ID, EOS_ID, PAD_ID

FILE_OF = {"fp32": "model.onnx", "int8": "model_int8.onnx", "int4": "model_q4.onnx"}
"""Names by which transformers.js finds a file for its `dtype` fp32, int8, q4."""


def write_beside(source: Source, path: Path, kind: str, external: bool) -> None:
    """`kind` is that of FILE_OF; `external`: the weights lie in a file of their own."""
    config = source.config
    _write_json(path / "genai_config.json", _genai_config(config, kind))
    _write_json(path / "config.json", _javascript_config(config, kind, external))
    ids = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": PAD_ID}
    _write_json(path / "generation_config.json", ids)
    _write_tokenizer(source, path)
    if source.chat_template is not None:
        (path / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")


def _write_tokenizer(source: Source, path: Path) -> None:
    """The usual files, under the one class for which onnxruntime-genai merges runs of spaces by their rank.

    For all others it cuts a text before the last space of a run, which changes the ids of any text with two
    spaces in a row. transformers.js merges them by their rank whatever the class, and looks for a chat
    template in tokenizer_config.json alone.
    """
    source.tokenizer.save(path, model_max_length=source.config.max_position_embeddings)
    file = path / "tokenizer_config.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    template = {} if source.chat_template is None else {"chat_template": source.chat_template}
    _write_json(file, {**values, "tokenizer_class": "GemmaTokenizer", **template})


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
