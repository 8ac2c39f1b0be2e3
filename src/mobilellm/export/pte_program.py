"""From the static model to the bytes of a .pte program, and what is in such a program."""

from __future__ import annotations

import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mobilellm.artefacts.executorch_engine import DESCRIPTION, load_operators
from mobilellm.export.static_model import StaticModel, StoredMatrix
from mobilellm.model.quantized import Matrix, packed
from mobilellm.tokenizer import BOS_ID, EOS_ID

OUTSIDE = frozenset(
    {
        "aten::sym_size", "aten::embedding", "aten::select_copy", "aten::slice_copy", "aten::mul",
        "aten::sub", "aten::floor", "aten::cat", "aten::stack", "aten::view_copy", "aten::unsqueeze_copy",
        "aten::_local_scalar_dense", "dim_order_ops::_to_dim_order_copy", "executorch_prim::add",
        "executorch_prim::et_view", "executorch_prim::sub", "executorch_prim::mul",
        "llama::update_cache", "llama::custom_sdpa",
    }
)  # fmt: skip
"""Operators that a program may run outside XNNPACK: the embedding's rows, views, the cache and attention."""
_ALIGNMENT = 128
"""Of data in a program, as ExecuTorch has it by default."""


def lower(model: StaticModel, description: Mapping[str, Any]) -> bytes:
    """The program's bytes, with all but the operators of `OUTSIDE` given to XNNPACK.

    It takes some seconds for every executed step.
    """
    load_operators()
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
    from executorch.exir.passes import MemoryPlanningPass
    from executorch.exir.passes.sym_shape_eval_pass import ConstraintBasedSymShapeEvalPass

    length = torch.export.Dim("length", min=1, max=model.chunk)
    example = (torch.zeros(1, min(3, model.chunk), dtype=torch.long), torch.tensor([0]))
    with _quietly(), torch.no_grad():
        exported = torch.export.export(model, example, dynamic_shapes=({1: length}, None), strict=False)
        edge = to_edge_transform_and_lower(
            exported,
            partitioner=[XnnpackPartitioner()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
            constant_methods={**_runner_metadata(model), DESCRIPTION: json.dumps(description)},
        )
        program = edge.to_executorch(
            ExecutorchBackendConfig(
                memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
                sym_shape_eval_pass=ConstraintBasedSymShapeEvalPass(),
                extract_delegate_segments=True,
            )
        )
    return _without_copies(bytes(program.buffer))


def _without_copies(raw: bytes) -> bytes:
    """The same program, in which what is a constant and was given to XNNPACK, too, lies once.

    So it is with an embedding and the head tied to it. A program finds all of its data by offsets into the
    file, and those of XNNPACK then lead to where the constants lie.
    """
    from executorch.exir._serialize import _program as serialize
    from executorch.exir._serialize.padding import aligned_size, pad_to

    header = serialize._get_extended_header(raw)
    program = serialize._flatbuffer_to_program(raw[: header.program_size])
    data = raw[header.segment_base_offset :]
    segments = [data[each.offset : each.offset + each.size] for each in program.segments]
    assert program.constant_segment.segment_index == 0
    starts = program.constant_segment.offsets
    constants = [
        (start, segments[0][start:end]) for start, end in zip(starts, [*starts[1:], None], strict=True)
    ]
    for_xnnpack = {entry.segment_index for entry in program.named_data}
    kept = bytearray()
    for index, (told, segment) in enumerate(zip(program.segments, segments, strict=True)):
        same = (start for start, constant in constants if constant.startswith(segment))
        place = next(same, None) if index in for_xnnpack else None
        if place is not None:
            told.offset = place
            continue
        told.offset = aligned_size(len(kept), _ALIGNMENT)
        kept += bytes(told.offset - len(kept)) + segment
    written = serialize._program_to_flatbuffer(program)
    length = aligned_size(header.EXPECTED_LENGTH, written.max_alignment)
    header.program_size = length + len(written.data)
    header.segment_base_offset = aligned_size(header.program_size, _ALIGNMENT)
    header.segment_data_size = len(kept)
    head = serialize._insert_flatbuffer_header(written.data, "ET", pad_to(header.to_bytes(), length))
    return bytes(pad_to(head, header.segment_base_offset) + kept)


def _runner_metadata(model: StaticModel) -> dict[str, Any]:
    """What ExecuTorch's own runners ask a program."""
    return {
        "get_bos_id": BOS_ID,
        "get_eos_ids": [EOS_ID],
        "get_vocab_size": model.config.vocab_size,
        "get_max_seq_len": model.chunk,  # tokens at once
        "get_max_context_len": model.context,
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


@dataclass(frozen=True)
class Contents:
    """What lies in a program."""

    description: dict[str, Any]
    stop_ids: frozenset[int]
    delegates: int
    """Pieces that XNNPACK runs."""
    outside: frozenset[str]
    """Operators run by ExecuTorch itself, without their overloads."""
    data: frozenset[str]
    """Keys of what XNNPACK was given: SHA-256 of its bytes, each stored once however often it is used."""
    constants: frozenset[str]
    """SHA-256 of the constants outside XNNPACK."""


def read_program(file: Path) -> Contents:
    """Raises FileNotFoundError, or ValueError for what is no program of ours, or not all of one."""
    from executorch.exir._serialize._program import deserialize_pte_binary

    raw = file.read_bytes()
    try:
        whole = deserialize_pte_binary(raw)
        plans = {plan.name: plan for plan in whole.program.execution_plan}
        description = json.loads(_constant(plans[DESCRIPTION]).string_val)
        stops = _constant(plans["get_eos_ids"])
        main = plans["forward"]
    except Exception as error:  # whatever a parser meets in damaged bytes
        raise ValueError(f"{file}: is no program of ours, or not all of it ({error!r})") from None
    named = whole.named_data
    for key, entry in named.pte_data.items():
        data = named.buffers[entry.buffer_index]
        if hashlib.sha256(data).hexdigest() != key.removeprefix("scale_"):
            raise ValueError(f"{file}: the bytes under {key[:16]}… are not those that were written")
    return Contents(
        description,
        _stop_ids(stops, plans["get_eos_ids"]),
        len(main.delegates),
        frozenset(operator.name for operator in main.operators),
        frozenset(named.pte_data),
        frozenset(hashlib.sha256(buffer.storage).hexdigest() for buffer in whole.program.constant_buffer),
    )


def keys_of(matrix: StoredMatrix) -> tuple[str, ...]:
    """Keys under which a program holds a matrix that XNNPACK multiplies with."""
    if not isinstance(matrix, Matrix):
        return (_sha256(matrix),)
    codes = packed(matrix.codes) if matrix.bits == 4 else matrix.codes
    grouped = matrix.scales.shape[1] > 1
    scales = matrix.scales.to(torch.bfloat16 if grouped else torch.float32)
    return _sha256(codes), "scale_" + _sha256(scales)


def _sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def _constant(plan: Any) -> Any:
    """The value that a method without instructions gives."""
    return plan.values[plan.outputs[0]].val


def _stop_ids(value: Any, plan: Any) -> frozenset[int]:
    items = getattr(value, "items", None)
    if items is None:
        return frozenset({value.int_val})
    return frozenset(int(plan.values[index].val.int_val) for index in items)


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the warnings that torch and ExecuTorch have about each other."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(level)
