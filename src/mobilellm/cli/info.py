"""What a preset or a model is: shape, exact parameters, bytes at a bit width, KV cache, FLOPs per token.

Without an argument: all published presets in one table. With one preset, model directory, config.json or run
directory: a sheet. Reads config.json only; needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from json import dumps
from typing import Annotated, Any

import tyro

from mobilellm.accounting import (
    BitWidths,
    Parameters,
    attention_flops_per_token,
    bytes_by_part,
    check_bits,
    executed_parameters,
    forward_flops_per_token,
    kv_cache_bytes_per_token,
    stored_parameters,
    training_flops_per_token,
)
from mobilellm.cli.subject import Subject, find_subject
from mobilellm.cli.tables import print_notes, print_sheet, print_table
from mobilellm.config import ModelConfig
from mobilellm.presets import PUBLISHED, preset_names


@dataclass(frozen=True)
class Arguments:
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PRESET|PATH ...]")] = ()
    """Presets; paths of a model directory, run, config.json or .gguf file. Default: the published presets."""

    bits: float = 16
    """Bits per stored weight of the matrices, scales included: 16, 8, 4, or 8.5 for Q8_0, 4.5 for Q4_0."""

    embedding_bits: float | None = None
    """Bits per weight of embedding and head, where they differ from --bits."""

    kv_bits: float = 16
    """Bits per number in the KV cache."""

    json: bool = False
    """Print one JSON object instead of a table."""


def run(arguments: Arguments) -> None:
    check_bits(arguments.bits, "bits")
    check_bits(
        arguments.bits if arguments.embedding_bits is None else arguments.embedding_bits, "embedding_bits"
    )
    check_bits(arguments.kv_bits, "kv_bits")
    widths = BitWidths.of_matrices(arguments.bits, arguments.embedding_bits)
    subjects = [find_subject(name) for name in arguments.models or PUBLISHED]
    if arguments.json:
        print(dumps({"models": [_record(each, widths, arguments.kv_bits) for each in subjects]}, indent=2))
    elif len(subjects) == 1:
        _print_sheet(subjects[0], widths, arguments.kv_bits)
    else:
        _print_table(subjects, widths, arguments.kv_bits)
        if not arguments.models:
            others = [name for name in preset_names() if name not in PUBLISHED]
            print_notes([f"Presets for small machines and tests, not published: {', '.join(others)}."])


def _print_table(subjects: Sequence[Subject], widths: BitWidths, kv_bits: float) -> None:
    header = (
        "model", "layers", "heads", "KV\nheads", "dimension", "FFN", "parameters", "context", "GQA",
        "shared\nembeddings", "layer\nsharing", f"MB at\n{_bits(widths)}", f"KV B/token\n({kv_bits:g} bits)",
        "GFLOP/token\nforward",
    )  # fmt: skip
    print_table(header, [_row(subject, widths, kv_bits) for subject in subjects])
    notes = _notes(widths)
    notes += [f"{subject.name}: {repair}" for subject in subjects for repair in subject.repairs]
    print_notes(notes)


def _row(subject: Subject, widths: BitWidths, kv_bits: float) -> tuple[str, ...]:
    config = subject.config
    stored = stored_parameters(config)
    return (
        subject.name,
        str(config.num_layers),
        str(config.num_heads),
        str(config.num_kv_heads),
        f"{config.hidden_size:,}",
        f"{config.intermediate_size:,}",
        f"{stored.total:,}",
        f"{config.max_position_embeddings:,}",
        _gqa(config),
        "yes" if config.tie_word_embeddings else "no",
        f"{config.repeats}x {config.order}" if config.shares_layers else "no",
        f"{bytes_by_part(stored, widths).total / 1e6:,.1f}",
        f"{kv_cache_bytes_per_token(config, kv_bits):,}",
        _giga(forward_flops_per_token(config, config.max_position_embeddings)),
    )


def _print_sheet(subject: Subject, widths: BitWidths, kv_bits: float) -> None:
    config = subject.config
    stored, executed = stored_parameters(config), executed_parameters(config)
    context = config.max_position_embeddings
    kv_bytes = kv_cache_bytes_per_token(config, kv_bits)
    layers = f"{config.num_layers}"
    if config.shares_layers:
        layers += f" stored, {config.num_steps} executed ({config.repeats}x {config.order})"
    rows = [("model", subject.name)]
    if subject.path is not None:
        rows.append(("config", f"{subject.path} (layout {subject.model_type})"))
    rows += [("repaired", repair) for repair in subject.repairs]
    rows += [
        ("layers", layers),
        ("heads", f"{config.num_heads} query, {config.num_kv_heads} key/value (GQA {_gqa(config)})"),
        ("head dimension", f"{config.head_dim}"),
        ("dimension", f"{config.hidden_size:,}"),
        ("FFN dimension", f"{config.intermediate_size:,}"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("context", f"{context:,} tokens"),
        ("shared embeddings", "yes" if config.tie_word_embeddings else "no"),
        ("parameters", f"{stored.total:,}"),
        *_parts(stored, ""),
        ("executed per token", f"{executed.total:,}"),
        (f"bytes at {_bits(widths)}", f"{bytes_by_part(stored, widths).total:,}"),
        *_parts(bytes_by_part(stored, widths), " B"),
        ("KV cache", f"{kv_bytes:,} B a token, {kv_bytes * context:,} B full, at {kv_bits:g} bits"),
        ("FLOPs forward", f"{_giga(forward_flops_per_token(config, context))} G a token"),
        ("FLOPs training", f"{_giga(training_flops_per_token(config, context))} G a token"),
        ("  6N alone", f"{_giga(training_flops_per_token(config, context, attention=False))} G a token"),
    ]
    rows += [
        ("weight file", f"{name}, {size:,} B ({size * 8 / stored.total:.2f} bits a parameter)")
        for name, size in subject.files.items()
    ]
    print_sheet(rows)
    print_notes(_notes(widths))


def _parts(parameters: Parameters, unit: str) -> list[tuple[str, str]]:
    return [(f"  {part}", f"{count:,}{unit}") for part, count in asdict(parameters).items() if count]


def _notes(widths: BitWidths) -> list[str]:
    return [
        f"Bytes: weights alone, each stored once; norms at {widths.norms:g} bits; 1 MB = 10^6 bytes. "
        "A quantised format's scales count in its bits per weight (Q8_0 8.5, Q4_0 4.5).",
        "KV cache: keys and values of every executed layer. FLOPs: 2 per executed weight, head included, "
        "plus causal attention averaged over the context; training 3 times that.",
    ]


def _bits(widths: BitWidths) -> str:
    if widths.embedding == widths.linear:
        return f"{widths.linear:g} bits"
    return f"{widths.linear:g}/{widths.embedding:g} bits"


def _giga(number: int) -> str:
    return f"{number / 1e9:.3f}" if number >= 1e8 else f"{number / 1e9:.3g}"


def _gqa(config: ModelConfig) -> str:
    groups = config.num_heads // config.num_kv_heads
    return f"{groups}:1" if groups > 1 else "no"


def _record(subject: Subject, widths: BitWidths, kv_bits: float) -> dict[str, Any]:
    config = subject.config
    context = config.max_position_embeddings
    stored = stored_parameters(config)
    return {
        "name": subject.name,
        "path": None if subject.path is None else str(subject.path),
        "model_type": subject.model_type,
        "repairs": list(subject.repairs),
        "config": config.to_dict(),
        "executed_layers": config.num_steps,
        "parameters": _with_total(stored),
        "executed_parameters": _with_total(executed_parameters(config)),
        "bits": asdict(widths) | {"kv_cache": kv_bits},
        "bytes": _with_total(bytes_by_part(stored, widths)),
        "kv_cache_bytes_per_token": kv_cache_bytes_per_token(config, kv_bits),
        "flops_per_token": {
            "context": context,
            "forward": forward_flops_per_token(config, context),
            "forward_at_full_context": forward_flops_per_token(config, context, attention=False)
            + attention_flops_per_token(config, context),
            "training": training_flops_per_token(config, context),
            "training_6n": training_flops_per_token(config, context, attention=False),
        },
        "files": subject.files,
    }


def _with_total(parameters: Parameters) -> dict[str, int]:
    return asdict(parameters) | {"total": parameters.total}
