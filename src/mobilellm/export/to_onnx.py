"""A model as a directory that onnxruntime-genai runs, in the layout that transformers.js loads.

onnx/model_q4.onnx         or model_int8.onnx, model.onnx: weights and graph (`onnx_graph.py`)
genai_config.json, config.json, the tokenizer's files (`onnx_beside.py`)
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.artefacts.onnx_engine import model_file
from mobilellm.artefacts.opening import open_artefact
from mobilellm.bytes_on_disk import bytes_on_disk
from mobilellm.config import ModelConfig
from mobilellm.export.check import Check, count_check
from mobilellm.export.engine_runtime import EngineRuntime
from mobilellm.export.genai_runtime import genai_runtime
from mobilellm.export.onnx_beside import FILE_OF, write_beside
from mobilellm.export.onnx_graph import CONFIG, EMBEDDING_TYPE, TYPE, StoredTensor, model_proto
from mobilellm.export.questions import Floats
from mobilellm.export.source import Source, kept_types
from mobilellm.export.targets import KINDS, Inventory, Opener, Options, Stored
from mobilellm.export.to_gguf import TARGET as GGUF
from mobilellm.gguf_blocks import TYPES
from mobilellm.quant.formats import Q4_0, Q8_0, WeightFormat
from mobilellm.quant.schemes import EMBEDDING_NAMES
from mobilellm.tokenizer import EOS_ID

FORMATS = {"fp32": None, "int8": Q8_0, "int4": Q4_0}
ONE_FILE = 1_900_000_000
"""Bytes of weights that fit in the .onnx file itself: protobuf ends at 2 GB. More lie beside it."""


_KEPT = {"q8_0": "int8", "q4_0": "int4"}
_REFUSAL = (
    "; onnxruntime multiplies with blocks of 32 and scales in float16, quantise its source with "
    "--scheme q4_0 or q8_0"
)


class OnnxTarget:
    """See `Target`."""

    kind = KINDS["onnx"]

    def complete(self, options: Options, source: Source) -> Options:
        """A model quantised in q4_0 and q8_0 keeps its own."""
        if source.quantized is not None:
            return kept_types(source, options, self.kind.name, _KEPT, _REFUSAL)
        kind = _known(options.type or "int4")
        return dataclasses.replace(options, type=kind, embedding_type=_known(options.embedding_type or kind))

    def write(self, source: Source, path: Path, options: Options) -> list[str]:
        config, kind = source.config, str(options.type)
        blocks = FORMATS[kind]
        widths = {"hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size}
        if blocks is not None and not any(map(blocks.fits, widths.values())):
            raise ValueError(
                f"type = {kind}: stores blocks of {blocks.group} numbers, which divide neither "
                + " nor ".join(f"{name} = {width}" for name, width in widths.items())
                + "; take --type fp32"
            )
        proto = _model(source, options)
        external = _write_model(proto, path / "onnx" / FILE_OF[kind])
        write_beside(source, path, kind, external)
        return _notes(source, options)

    def options_of(self, path: Path, source: Source) -> Options:
        """What the model's file says of itself."""
        said = _metadata(_read(path))
        return Options(type=said.get(TYPE), embedding_type=said.get(EMBEDDING_TYPE))

    def expected(self, source: Source, options: Options) -> Inventory:
        proto = _model(source, options)
        template = source.chat_template or ""
        files = source.tokenizer_bytes + len(template.encode()) + len(json.dumps(template))
        return Inventory(source.config, _tensors(proto), frozenset({EOS_ID}), proto.ByteSize() + files)

    def inventory(self, path: Path) -> Inventory:
        """The configuration, from the file's metadata; the graph has a check of its own."""
        proto = _read(path)
        described = json.loads((path / "genai_config.json").read_text(encoding="utf-8"))
        stop = described["model"].get("eos_token_id")
        stops = stop if isinstance(stop, list) else [] if stop is None else [stop]
        size = bytes_on_disk(path)
        said = _metadata(proto)
        if CONFIG not in said:
            raise ValueError(f"{path}: its model was not written by mobilellm export")
        config = ModelConfig.from_json(said[CONFIG], str(path))
        return Inventory(config, _tensors(proto), frozenset(stops), size)

    def reference(self, source: Source, options: Options) -> Callable[[Sequence[int]], Floats]:
        """That of a .gguf file with the same blocks."""
        kinds = {"fp32": "F32", "int8": "Q8_0", "int4": "Q4_0"}
        linear, embedding = kinds[str(options.type)], kinds[str(options.embedding_type)]
        return GGUF.reference(source, Options(type=linear, embedding_type=embedding))

    def checks(self, path: Path, source: Source, options: Options) -> list[Check]:
        """Every node must be the one that is written for such a model, and every number."""
        there = _read(path)
        wanted = _model(source, options)
        nodes = {node.name: node.SerializeToString() for node in there.graph.node}
        expected = {node.name: node.SerializeToString() for node in wanted.graph.node}
        wrong = [f"{name} differs" for name in expected if nodes.get(name) != expected[name]]
        wrong += [f"{name} is too much" for name in nodes.keys() - expected.keys()]
        numbers = {tensor.name: tensor.raw_data for tensor in there.graph.initializer}
        off = [
            f"{tensor.name} differs"
            for tensor in wanted.graph.initializer
            if numbers.get(tensor.name) != tensor.raw_data
        ]
        products = sum(node.op_type == "MatMulNBits" for node in there.graph.node)
        return [
            count_check(
                "graph", "nodes", wrong, f"all {len(expected)} nodes; {products} of quantised products"
            ),
            count_check("weights", "tensors", off, f"all {len(numbers)} tensors byte for byte"),
        ]

    def beside(self, name: str, source: Source, options: Options) -> Mapping[str, str]:
        return {}

    def runtimes(self, path: Path) -> Mapping[str, Opener]:
        return {"onnxruntime-genai": genai_runtime, "onnxruntime": onnxruntime}


TARGET = OnnxTarget()


@contextmanager
def onnxruntime(path: Path) -> Iterator[EngineRuntime]:
    """Raises ValueError for a directory that cannot be run."""
    from onnxruntime import __version__

    runtime = EngineRuntime(open_artefact(path))
    runtime.name = f"onnxruntime {__version__}"
    yield runtime


def _known(kind: str) -> str:
    if kind not in FORMATS:
        raise ValueError(f"type = {kind!r} is not known to onnx; choose one of {', '.join(FORMATS)}")
    return kind


def _model(source: Source, options: Options) -> Any:
    """The onnx.ModelProto. A matrix whose rows the blocks do not divide is stored as float16."""

    def stored(name: str) -> StoredTensor:
        if source.quantized is not None and name in source.quantized.matrices:
            return source.quantized.matrices[name]
        weight = source.tensors[name].float()
        blocks = _blocks(name, options)
        if weight.ndim == 1 or blocks is None:
            return source.weight(name)
        if blocks.fits(weight.shape[1]):
            return blocks.quantize(weight)
        return TYPES["F16"].encode(weight.numpy()).view(np.float16).reshape(weight.shape)

    said = {TYPE: str(options.type), EMBEDDING_TYPE: str(options.embedding_type)}
    return model_proto(source.config, stored, said)


def _blocks(name: str, options: Options) -> WeightFormat | None:
    return FORMATS[str(options.embedding_type if name in EMBEDDING_NAMES else options.type)]


def _notes(source: Source, options: Options) -> list[str]:
    matrices = {
        name: (tensor.shape[1], blocks)
        for name, tensor in source.tensors.items()
        if tensor.ndim == 2 and (blocks := _blocks(name, options)) is not None
    }
    wide = {name: width for name, (width, blocks) in matrices.items() if not blocks.fits(width)}
    notes = [
        f"{sum(width == each for each in wide.values())} matrices are stored as float16: "
        f"32 does not divide their rows of {width}"
        for width in sorted(set(wide.values()))
    ]
    if matrices:
        notes.append(f"{len(matrices) - len(wide)} of {len(matrices)} matrices are quantised")
    return notes


def _read(directory: Path) -> Any:
    """The model of a directory. Raises FileNotFoundError, or ValueError for what is none."""
    import onnx
    from google.protobuf.message import DecodeError

    file = model_file(directory)
    try:
        return onnx.load(str(file))
    except DecodeError as error:
        raise ValueError(f"{file}: is no ONNX model, or not all of it ({error})") from None


def _metadata(proto: Any) -> dict[str, str]:
    return {entry.key: entry.value for entry in proto.metadata_props}


def _tensors(proto: Any) -> dict[str, Stored]:
    from onnx import TensorProto

    return {
        tensor.name: Stored(tuple(tensor.dims), TensorProto.DataType.Name(tensor.data_type).lower())
        for tensor in proto.graph.initializer
    }


def _write_model(proto: Any, file: Path) -> bool:
    """Write the .onnx file; whether its weights lie beside it, in NAME.onnx_data."""
    import onnx

    file.parent.mkdir()
    external = sum(len(tensor.raw_data) for tensor in proto.graph.initializer) > ONE_FILE
    onnx.save_model(
        proto, str(file), save_as_external_data=external, location=f"{file.name}_data", size_threshold=1024
    )
    return external
