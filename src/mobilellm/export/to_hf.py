"""A model as a directory for transformers: a plain Llama, or a shared model that carries its code."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path

import numpy as np
import safetensors
import torch

from mobilellm.bytes_on_disk import bytes_on_disk
from mobilellm.config import ModelConfig
from mobilellm.export.arithmetic import float_logits
from mobilellm.export.check import Check
from mobilellm.export.questions import Floats
from mobilellm.export.source import Source, growth_note, stored_name
from mobilellm.export.stock_transformers import stock_transformers
from mobilellm.export.targets import KINDS, Inventory, Opener, Options, Stored
from mobilellm.licence import licence_files
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.model_directory import read_config_file
from mobilellm.tokenizer import EOS_ID

_TYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class HfTarget:
    """See `Target`."""

    kind = KINDS["hf"]

    def complete(self, options: Options, source: Source) -> Options:
        if source.quantized is not None:
            raise ValueError(f"{source.name}: {checkpoint.cannot_be_plain(source.quantized.quantization)}")
        if options.type is not None:
            checkpoint.torch_dtype(options.type)
        return options

    def write(self, source: Source, path: Path, options: Options) -> list[str]:
        weights = checkpoint.Weights(source.config, source.tensors, "llama", ())
        model = checkpoint.build(weights, _dtype(source, options))
        notes = []
        if options.unroll and source.config.shares_layers:
            model = checkpoint.unroll(model)
            notes.append(growth_note(source.config))
        elif source.config.shares_layers:
            notes.append(
                "Blocks are shared: the directory carries its code and loads with trust_remote_code=True. "
                "For a plain Llama: --unroll."
            )
        licence = licence_files(source.directory)
        checkpoint.save(
            path, model, source.tokenizer, further_files=licence, chat_template=source.chat_template
        )
        return notes

    def options_of(self, path: Path, source: Source) -> Options:
        kinds = {stored.type for stored in _stored(path).values()}
        described = read_config_file(path)
        return Options(
            type=kinds.pop() if len(kinds) == 1 else None,
            unroll=source.config.shares_layers and described.model_type == "llama",
        )

    def expected(self, source: Source, options: Options) -> Inventory:
        dtype = _dtype(source, options)
        kind = str(dtype).removeprefix("torch.")
        config = _config(source, options)
        with torch.device("meta"):
            shapes = {
                name: tuple(parameter.shape) for name, parameter in MobileLLM(config).named_parameters()
            }
        weights = sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize
        header = sum(len(name) + 100 for name in shapes)
        further = sum(file.stat().st_size for file in licence_files(source.directory))
        if config.shares_layers:
            further += sum(
                len((files("mobilellm") / "hf" / name).read_bytes()) for name in checkpoint.REMOTE_CODE
            )
        return Inventory(
            config,
            {name: Stored(shape, kind) for name, shape in shapes.items()},
            frozenset({EOS_ID}),
            weights + header + source.tokenizer_bytes + further + len((source.chat_template or "").encode()),
        )

    def inventory(self, path: Path) -> Inventory:
        try:
            values = json.loads((path / "generation_config.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            values = {}
        stop = values.get("eos_token_id")
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        return Inventory(
            read_config_file(path).config,
            _stored(path),
            frozenset(stops),
            bytes_on_disk(path),
        )

    def reference(self, source: Source, options: Options) -> Callable[[Sequence[int]], Floats]:
        """Weights rounded to the directory's dtype; all else float32, as the runtime is asked to run it."""
        dtype = _dtype(source, options)
        model = source.model(lambda name, values: values.to(dtype).float())
        return lambda tokens: float_logits(model, tokens)

    def checks(self, path: Path, source: Source, options: Options) -> list[Check]:
        """Every value must be the source's, rounded to the dtype."""
        dtype, config = _dtype(source, options), _config(source, options)
        worst, where = 0.0, "all values are equal"
        with safetensors.safe_open(path / "model.safetensors", "pt") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                parameter = stored_name(name, source.config) if config != source.config else name
                if parameter not in source.tensors:
                    continue  # the check of the tensors names it
                there, wanted = file.get_tensor(name), source.tensors[parameter].to(dtype)
                if there.shape != wanted.shape:
                    continue
                off = float((there.float() - wanted.float()).abs().max())
                if off > worst:
                    worst, where = off, name
        return [Check("weights", worst, 0.0, "largest difference", where)]

    def beside(self, name: str, source: Source, options: Options) -> Mapping[str, str]:
        return {}

    def runtimes(self, path: Path) -> Mapping[str, Opener]:
        return {"transformers": stock_transformers}


TARGET = HfTarget()


def _config(source: Source, options: Options) -> ModelConfig:
    return source.config.unrolled() if options.unroll and source.config.shares_layers else source.config


def _dtype(source: Source, options: Options) -> torch.dtype:
    if options.type is not None:
        return checkpoint.torch_dtype(options.type)
    return checkpoint.stored_dtype(checkpoint.Weights(source.config, source.tensors, "llama", ()))


def _stored(path: Path) -> dict[str, Stored]:
    """Raises ValueError for a file that is damaged."""
    stored = {}
    try:
        with safetensors.safe_open(path / "model.safetensors", "np") as file:
            for name in file.keys():  # noqa: SIM118 (no mapping)
                view = file.get_slice(name)
                kind = view.get_dtype()
                stored[name] = Stored(tuple(view.get_shape()), _TYPES.get(kind, kind))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: model.safetensors is cut off or damaged ({error})") from None
    return stored
