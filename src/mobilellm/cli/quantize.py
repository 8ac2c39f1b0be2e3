"""Shrink a model to 8 or 4 bits a weight, and measure what that costs beside the model it was made from.

OUT is a directory that every command takes, with the very whole numbers and scales that an export writes; or,
ending in .gguf, the file a device runs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilellm.cli.tables import print_notes, print_sheet

if TYPE_CHECKING:
    from mobilellm.model.api import LoadedModel
    from mobilellm.quant.compare import Judge
    from mobilellm.quant.quantize import Progress, Result

SchemeName = Literal["q4_0", "q8_0", "8da4w", "int8", "w8a8"]
_WORST = 5
_WINDOW = 2_048


@dataclass(frozen=True)
class Arguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Model directory, training run, or Hub id (org/name)."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Directory or .gguf file to write; it appears whole or not at all."""
    scheme: SchemeName = "q8_0"
    """q8_0, q4_0: GGUF, for our runtime and llama.cpp. 8da4w: ExecuTorch. int8: weights alone. w8a8: the
    paper's."""
    embedding: Literal["q4_0", "q8_0", "int4", "int8"] | None = None
    """Format of embedding and head where it is not the scheme's own: q4_0 can have q8_0, 8da4w int4."""
    group: int | None = None
    """8da4w: weights that share a scale. 32, the default, divides every published width."""
    kv: Literal["float", "int8"] = "float"
    """Keys and values: as they are, or rounded to 8 bits for each token and head."""
    eval_data: tuple[Path, ...] = ()
    """Text files to compare on; by default part of Python's language reference."""
    eval_tokens: int = 16_384
    """Tokens to compare on, spread over the text; 0: do not compare."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace OUT if it is there."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    from mobilellm.quant.quantize import quantize
    from mobilellm.quant.schemes import check_widths, scheme

    chosen = scheme(arguments.scheme, arguments.embedding, arguments.group, kv=arguments.kv == "int8")
    _check_out(arguments, chosen.in_gguf)
    loaded, directory = _load(arguments.model)
    check_widths(chosen, loaded.model.config)
    judge, texts = _judge(arguments, loaded)
    with _progress() as progress:
        result = quantize(loaded.model, chosen, judge, progress)
    report = {"source": arguments.model, "method": "rtn", "compared_on": texts, **result.to_dict()}
    size = _write(arguments, loaded, directory, result, report)
    report = {"out": str(arguments.out), "file_bytes": size, **report}
    if arguments.json:
        print(json.dumps(report))
        return
    _show(report, result)


def _check_out(arguments: Arguments, in_gguf: bool) -> None:
    from mobilellm.atomic import check_destination
    from mobilellm.layouts import not_a_model_directory

    out = arguments.out
    if out.suffix != ".gguf":
        check_destination(out, arguments.overwrite, not_a_model_directory)
        return
    if not in_gguf:
        raise ValueError(
            f"scheme = {arguments.scheme} is none of GGUF's; take q4_0 or q8_0, or name a directory"
        )
    if arguments.kv == "int8":
        raise ValueError(
            f"kv = int8 does not go with {out}: what runs a .gguf file chooses how it keeps them"
        )
    if out.is_dir():
        raise IsADirectoryError(f"{out}: is a directory; name a file")
    if out.exists() and not arguments.overwrite:
        raise FileExistsError(f"{out}: exists; choose another name or pass --overwrite")


def _load(source: str) -> tuple[LoadedModel, Path]:
    """In float32: that holds bfloat16 and float16 exactly, and what is compared is the rounding alone."""
    from mobilellm.model import hub
    from mobilellm.model.api import load

    directory = hub.resolve(source, _say)
    loaded = load(directory, "float32", say=_say)
    if (quantization := loaded.model.quantization) is not None:
        raise ValueError(
            f"{source}: is quantised already ({quantization.scheme}); quantise what it was made from"
        )
    return loaded, directory


def _judge(arguments: Arguments, loaded: LoadedModel) -> tuple[Judge | None, list[str]]:
    from mobilellm.cli.quantize_texts import evaluation_texts
    from mobilellm.eval.torch_model import torch_model
    from mobilellm.quant.compare import Judge, windows

    if arguments.eval_tokens < 0:
        raise ValueError(f"eval_tokens = {arguments.eval_tokens} must be at least 0")
    if arguments.eval_tokens == 0:
        return None, []
    names, texts = evaluation_texts(arguments.eval_data, _say)
    model = torch_model(loaded)
    units = windows(model, texts, min(model.context, _WINDOW), arguments.eval_tokens)
    return Judge(loaded.model, units), names


def _write(
    arguments: Arguments, loaded: LoadedModel, directory: Path, result: Result, report: dict[str, Any]
) -> int:
    """Bytes of the file that holds the weights."""
    from mobilellm.model.checkpoint import Weights
    from mobilellm.model.quantized import WEIGHTS
    from mobilellm.quant.artefact import save

    out = arguments.out
    if out.suffix != ".gguf":
        save(out, loaded.model, result.stored, loaded.tokenizer, report, arguments.overwrite, directory)
        return (out / WEIGHTS).stat().st_size
    from mobilellm.atomic import atomic_write
    from mobilellm.export.source import source_of
    from mobilellm.export.targets import Options
    from mobilellm.export.to_gguf import TARGET

    weights = Weights(loaded.model.config, result.stored.tensors(), "", (), result.stored)
    source = source_of(arguments.model, directory, weights)
    TARGET.write(source, out, TARGET.complete(Options(), source))
    with atomic_write(out.with_suffix(".quantization.json")) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return out.stat().st_size


def _show(report: dict[str, Any], result: Result) -> None:
    kind = result.stored.quantization
    rows = [
        ("model", f"{report['out']}, made of {report['source']} in {result.seconds:.1f} s"),
        ("scheme", f"{kind.scheme}: {kind.linear}, embedding and head {kind.embedding}, {report['method']}"),
        ("tensors", f"{kind.bytes:,} B as predicted, {result.bits_per_weight:.2f} bits a weight"),
        ("file", f"{report['file_bytes']:,} B"),
    ]
    if (found := result.comparison) is not None:
        numbers = found.to_dict()
        before, after = numbers["source"], numbers["quantized"]
        rows += [
            ("compared on", f"{found.tokens:,} tokens of {', '.join(report['compared_on'])}"),
            (
                "perplexity",
                f"{before['perplexity']:.4f} -> {after['perplexity']:.4f} "
                f"({100 * (numbers['perplexity_ratio'] - 1):+.2f} %)",
            ),
            ("bits per byte", f"{before['bits_per_byte']:.4f} -> {after['bits_per_byte']:.4f}"),
            ("KL, nats a token", f"{found.kl:.5f}"),
            ("same likeliest token", f"{100 * found.agreement:.2f} %"),
            *(("worst products", f"{name}: {100 * error:.2f} %") for name, error in found.worst(_WORST)),
        ]
    print_sheet(rows)
    notes = [f"{name} is stored as {reason}" for name, reason in result.wider.items()]
    if notes:
        print_notes(notes)


@contextmanager
def _progress() -> Iterator[Progress]:
    from mobilellm.report.live_bar import LiveBar

    with LiveBar(transient=True) as bar:
        yield lambda what, done, total: bar.show(done, f"{done:,} of {total:,} {what}", total)


def _say(message: str) -> None:
    print(f"mobilellm: {message}", file=sys.stderr, flush=True)
