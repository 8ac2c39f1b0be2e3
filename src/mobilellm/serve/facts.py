"""What is said of the model that is served: in /v1/models, for the page and for whoever asks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mobilellm.accounting import stored_parameters
from mobilellm.bytes_on_disk import bytes_on_disk
from mobilellm.model_directory import is_adapter, model_in
from mobilellm.runtime.session import RuntimeModel
from mobilellm.serve.process import memory_bytes

_LICENCE = "general.license"


def facts(model: RuntimeModel) -> dict[str, Any]:
    """What stays as it is."""
    config, engine = model.engine.config, model.engine
    return {
        "parameters": stored_parameters(config).total,
        "layers": config.num_layers,
        "executed_layers": config.num_steps,
        "hidden_size": config.hidden_size,
        "vocabulary": model.tokenizer.vocab_size,
        "context": config.max_position_embeddings,
        "file_bytes": _file_bytes(Path(model.source)),
        "quantisation": _types(model),
        "engine": getattr(engine, "backend", None) or getattr(engine, "isa", "numpy"),
        "license": model.file.metadata.get(_LICENCE) if model.file is not None else None,
        "is_chat": model.chat_template is not None,
    }


def facts_of_now(model: RuntimeModel) -> dict[str, Any]:
    """What may be another the next time: on how many threads a token is computed, the memory taken."""
    return {"threads": getattr(model.engine, "threads", None), "memory_bytes": memory_bytes()}


def _types(model: RuntimeModel) -> str:
    """The number types of the weights, the one that most bytes have first."""
    if model.file is None:
        return str(getattr(model.engine, "types", "unknown"))
    sizes = model.file.bytes_by_type
    return "+".join(sorted(sizes, key=lambda kind: -sizes[kind]))


def _file_bytes(path: Path) -> int | None:
    """Of a training run, those of the model in it. None where files lie elsewhere: a Hub id, an adapter."""
    if path.is_dir():
        path = model_in(path)
    return bytes_on_disk(path) if path.exists() and not is_adapter(path) else None
