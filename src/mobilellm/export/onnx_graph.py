"""A model as an ONNX graph, written node by node, as onnxruntime-genai and transformers.js expect a decoder.

    inputs   input_ids (B, T), attention_mask (B, S), past_key_values.N.key and .value (B, K, past, D)
    outputs  logits (B, T, V), present.N.key and .value (B, K, S, D)

N counts executed steps, so the weights of a shared block are stored once, several nodes use them, and each
keeps a history of its own. Matrices in blocks are GGUF's Q8_0 and Q4_0, number for number: onnxruntime's
MatMulNBits with blocks of 32 and no zero points computes scale * (q - 8), or - 128 at 8 bits, and rounds its
input to 8 bits a block (accuracy level 4), which is the arithmetic of `runtime/reference.py`. Scales are
stored as float16 and widened when a session is made.
B batch, T new tokens, S all tokens, K key/value heads, D head_dim, E hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from mobilellm.config import ModelConfig
from mobilellm.gguf_blocks import BLOCK
from mobilellm.model.quantized import Matrix, packed

Numbers = NDArray[np.float32] | NDArray[np.float16]
StoredTensor = Matrix | Numbers
"""A tensor as it lies in the file: blocks of 32 with a float16 scale each, or numbers by themselves."""
CONFIG, TYPE, EMBEDDING_TYPE = "mobilellm.config", "mobilellm.type", "mobilellm.embedding_type"
"""What the file says of itself, in its metadata."""
OPSET, IR_VERSION = 21, 10  # of 2024: read by onnxruntime 1.20 and later


@dataclass
class Graph:
    """Nodes and initialisers; every value has the name of what made it."""

    nodes: list[Any] = field(default_factory=list)
    initializers: dict[str, Any] = field(default_factory=dict)

    def node(
        self, kind: str, name: str, *inputs: str, outputs: tuple[str, ...] = (), **attributes: Any
    ) -> str:
        """Add a node and return its first output, which has the node's name unless `outputs` says so."""
        from onnx import helper

        outputs = outputs or (name,)
        domain = "com.microsoft" if kind in _MICROSOFT else ""
        self.nodes.append(helper.make_node(kind, inputs, outputs, name, domain=domain, **attributes))
        return outputs[0]

    def initializer(self, name: str, values: NDArray[Any]) -> str:
        from onnx import numpy_helper

        if name not in self.initializers:
            self.initializers[name] = numpy_helper.from_array(values, name)
        return name


_MICROSOFT = {
    "FusedMatMul", "GatherBlockQuantized", "GroupQueryAttention", "MatMulNBits",
    "SkipSimplifiedLayerNormalization",
}  # fmt: skip


def model_proto(config: ModelConfig, stored: Callable[[str], StoredTensor], said: Mapping[str, str]) -> Any:
    """The onnx.ModelProto. `stored` gives a tensor by its checkpoint name, `said` goes into the metadata.

    Numbers in float16 are widened when a session is made.
    """
    from onnx import TensorProto, helper

    graph = Graph()
    presents = _decoder(graph, _Matrices(graph, stored), config)
    kv_heads, head_dim = config.num_kv_heads, config.head_dim

    def value(name: str, kind: int, *shape: str | int) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    def slots(names: list[str], length: str) -> list[Any]:
        shape = ("batch_size", kv_heads, length, head_dim)
        return [value(name, TensorProto.FLOAT, *shape) for name in names]

    inputs = [
        value("input_ids", TensorProto.INT64, "batch_size", "sequence_length"),
        value("attention_mask", TensorProto.INT64, "batch_size", "total_sequence_length"),
        *slots([name.replace("present", "past_key_values") for name in presents], "past_sequence_length"),
    ]
    outputs = [
        value("logits", TensorProto.FLOAT, "batch_size", "sequence_length", config.vocab_size),
        *slots(presents, "total_sequence_length"),
    ]
    made = helper.make_graph(graph.nodes, "mobilellm", inputs, outputs, list(graph.initializers.values()))
    domains = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=domains, ir_version=IR_VERSION, producer_name="mobilellm")
    helper.set_model_props(model, {CONFIG: config.to_json(), **said})
    return model


def _decoder(graph: Graph, matrices: _Matrices, config: ModelConfig) -> list[str]:
    """Add the whole model; return the names of the outputs that hold keys and values."""
    from onnx import TensorProto

    def gain(name: str) -> str:
        return graph.initializer(name, matrices.numbers(name))

    int32 = TensorProto.INT32
    one = graph.initializer("constant.one", np.array(1, np.int64))
    axis = graph.initializer("constant.axis", np.array([1], np.int64))
    seen = graph.node("ReduceSum", "tokens_seen", "attention_mask", axis, keepdims=0)
    last = graph.node("Cast", "last_position", graph.node("Sub", "tokens_before", seen, one), to=int32)
    width = graph.node("Gather", "mask_width", graph.node("Shape", "mask_shape", "attention_mask"), one)
    total = graph.node("Cast", "total_length", width, to=int32)
    cos, sin = _rotary_tables(graph, config)
    epsilon, heads = config.rms_norm_eps, {"num_heads": config.num_heads, "kv_num_heads": config.num_kv_heads}
    x, added, presents = matrices.embedding(), "", list[str]()

    def normed(name: str, parameter: str) -> str:
        """Norm of the residual stream; what was computed since the last one joins the stream on the way."""
        nonlocal x
        out = f"{name}.output"
        if not added:
            return graph.node(
                "SimplifiedLayerNormalization",
                name,
                x,
                gain(parameter),
                outputs=(out,),
                epsilon=epsilon,
                axis=-1,
            )
        inputs, stream = (x, added, gain(parameter)), f"{name}.stream"
        x = stream
        return graph.node(
            "SkipSimplifiedLayerNormalization", name, *inputs, outputs=(out, "", "", stream), epsilon=epsilon
        )

    for step, index in enumerate(config.schedule):
        at, block = f"step.{step}", f"model.layers.{index}"
        y = normed(f"{at}.input_norm", f"{block}.input_layernorm.weight")
        qkv = matrices.product(
            f"{at}.qkv", y, *(f"{block}.self_attn.{part}_proj.weight" for part in ("q", "k", "v"))
        )
        past = [f"past_key_values.{step}.{part}" for part in ("key", "value")]
        present = [f"present.{step}.{part}" for part in ("key", "value")]
        attended = graph.node(
            "GroupQueryAttention", f"{at}.attention", qkv, "", "", *past, last, total, cos, sin,
            outputs=(f"{at}.attended", *present), **heads, do_rotary=1, rotary_interleaved=0,
            scale=config.head_dim**-0.5,
        )  # fmt: skip
        presents += present
        added = matrices.product(f"{at}.o", attended, f"{block}.self_attn.o_proj.weight")
        y = normed(f"{at}.post_norm", f"{block}.post_attention_layernorm.weight")
        gate = matrices.product(f"{at}.gate", y, f"{block}.mlp.gate_proj.weight")
        up = matrices.product(f"{at}.up", y, f"{block}.mlp.up_proj.weight")
        silu = graph.node("Mul", f"{at}.silu", gate, graph.node("Sigmoid", f"{at}.sigmoid", gate))
        gated = graph.node("Mul", f"{at}.gated", silu, up)
        added = matrices.product(f"{at}.down", gated, f"{block}.mlp.down_proj.weight")
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    matrices.product("logits", normed("final_norm", "model.norm.weight"), head)
    return presents


def _rotary_tables(graph: Graph, config: ModelConfig) -> list[str]:
    """Cosines and sines (positions, D / 2) of position * theta^(-2i / D), made in float64."""
    exponents = np.arange(0, config.head_dim, 2) / config.head_dim
    angles = np.arange(config.max_position_embeddings)[:, None] / config.rope_theta**exponents
    tables = (("cos", np.cos(angles)), ("sin", np.sin(angles)))
    return [graph.initializer(f"rotary.{name}", table.astype(np.float32)) for name, table in tables]


class _Placed(NamedTuple):
    rows: int
    columns: int
    bits: int
    """0: numbers by themselves."""


@dataclass
class _Matrices:
    """The matrices of a graph, each stored once under its checkpoint name however often it is used."""

    graph: Graph
    stored: Callable[[str], StoredTensor]
    placed: dict[str, _Placed] = field(default_factory=dict)

    def numbers(self, name: str) -> NDArray[Any]:
        values = self.stored(name)
        assert isinstance(values, np.ndarray)
        return values

    def product(self, name: str, x: str, *parameters: str) -> str:
        """Add `name` = x W^T, with the rows of several matrices one below the other."""
        stem = parameters[0].removesuffix(".weight")
        if len(parameters) > 1:
            stem = stem.replace("q_proj", "qkv_proj")
        matrix = self._place(stem, parameters)
        if not matrix.bits:
            return self.graph.node("FusedMatMul", name, x, f"{stem}.weight", transB=1)
        return self.graph.node(
            "MatMulNBits", name, x, f"{stem}.weight", f"{stem}.scales",
            K=matrix.columns, N=matrix.rows, bits=matrix.bits, block_size=BLOCK, accuracy_level=4,
        )  # fmt: skip

    def embedding(self) -> str:
        """Add the rows of `input_ids` (B, T, E)."""
        graph, stem = self.graph, "model.embed_tokens"
        table = self._place(stem, (f"{stem}.weight",))
        if not table.bits:
            return graph.node("Gather", "embedded", f"{stem}.weight", "input_ids")
        shape = np.array([table.rows, table.columns * table.bits // 8])
        shape_name = graph.initializer("constant.embedding_shape", shape)
        rows = graph.node("Reshape", "embedding_rows", f"{stem}.weight", shape_name)
        return graph.node(
            "GatherBlockQuantized", "embedded", rows, "input_ids", f"{stem}.scales",
            bits=table.bits, block_size=BLOCK, gather_axis=0, quantize_axis=1,
        )  # fmt: skip

    def _place(self, stem: str, parameters: tuple[str, ...]) -> _Placed:
        """Add the initialisers of a matrix, unless they are there."""
        if stem not in self.placed:
            parts = [self.stored(parameter) for parameter in parameters]
            self.placed[stem] = (
                self._place_blocks(stem, [part for part in parts if isinstance(part, Matrix)])
                if isinstance(parts[0], Matrix)
                else self._place_numbers(stem, [part for part in parts if not isinstance(part, Matrix)])
            )
        return self.placed[stem]

    def _place_numbers(self, stem: str, parts: Sequence[Numbers]) -> _Placed:
        values = np.concatenate(parts)
        if values.dtype == np.float16:
            self._widened(f"{stem}.weight", values)
        else:
            self.graph.initializer(f"{stem}.weight", values)
        return _Placed(values.shape[0], values.shape[1], 0)

    def _place_blocks(self, stem: str, parts: Sequence[Matrix]) -> _Placed:
        codes, bits = torch.cat([part.codes for part in parts]), parts[0].bits
        rows, columns = codes.shape
        # as unsigned numbers, zero in the middle
        bytes_ = packed(codes) if bits == 4 else (codes.to(torch.int16) + 128).to(torch.uint8)
        self.graph.initializer(f"{stem}.weight", bytes_.view(rows, columns // BLOCK, -1).numpy())
        self._widened(f"{stem}.scales", torch.cat([part.scales for part in parts]).numpy())
        return _Placed(rows, columns, bits)

    def _widened(self, name: str, values: NDArray[Any]) -> None:
        """Store as float16, and add a node that makes it float32: onnxruntime runs it once a session."""
        from onnx import TensorProto

        stored = self.graph.initializer(f"{name}.float16", values)
        self.graph.node("Cast", name, stored, to=TensorProto.FLOAT)
