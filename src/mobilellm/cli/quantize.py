"""Shrink a model to 8 or 4 bits a weight, and measure what that costs beside the model it was made from.

OUT is a directory that every command takes, with the very whole numbers and scales that an export writes; or,
ending in .gguf, the file a device runs. --sweep DIR compares all schemes instead.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilellm.cli.notices import say
from mobilellm.cli.quantize_parts import (
    load_source,
    make_calibration,
    make_judge,
    progress_bar,
    stored_fingerprint,
)
from mobilellm.cli.quantize_sweep import sweep
from mobilellm.cli.tables import print_notes, print_sheet

if TYPE_CHECKING:
    from mobilellm.model.api import LoadedModel
    from mobilellm.quant.quantize import Calibration, Result

SchemeName = Literal["q4_0", "q8_0", "8da4w", "int8", "w8a8"]
_WORST = 5


@dataclass(frozen=True)
class Arguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Model directory, training run, or Hub id (org/name)."""
    out: Annotated[tyro.conf.Positional[Path | None], tyro.conf.arg(metavar="OUT")] = None
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
    method: Literal["rtn", "gptq"] = "rtn"
    """rtn: every weight to the nearest, in seconds. gptq: calibrated on text, in minutes: loses less."""
    calibration: tuple[Path, ...] = ()
    """gptq: text files like what the model will read; by default most of Python's language reference."""
    calibration_tokens: int = 16_384
    """gptq: tokens to calibrate on, spread over the text."""
    act_order: bool = True
    """gptq: round the columns with the largest inputs first."""
    eval_data: tuple[Path, ...] = ()
    """Text files to compare on; by default part of Python's language reference."""
    eval_tokens: int = 16_384
    """Tokens to compare on, spread over the text; 0: do not compare."""
    sweep: Path | None = None
    """Instead of OUT: compare all schemes and methods, and write table, JSON and picture into this folder."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace what is there."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    from mobilellm.quant.quantize import quantize
    from mobilellm.quant.schemes import check_widths, scheme

    if arguments.sweep is not None:
        sweep(arguments)
        return
    if arguments.out is None:
        raise ValueError(
            "quantize: name what to write, OUT or OUT.gguf; or compare all schemes with --sweep DIR"
        )
    chosen = scheme(arguments.scheme, arguments.embedding, arguments.group, kv=arguments.kv == "int8")
    _check_out(arguments.out, arguments, chosen.in_gguf)
    calibrate = arguments.method == "gptq"
    if arguments.calibration and not calibrate:
        raise ValueError("--calibration is for --method gptq; add that, or leave --calibration out")
    loaded, directory = load_source(arguments.model)
    check_widths(chosen, loaded.model.config)
    calibration: Calibration | None = None
    calibrated_on: list[str] = []
    if calibrate:
        calibration, calibrated_on = make_calibration(
            loaded, arguments.calibration, arguments.calibration_tokens, arguments.act_order
        )
    judge, compared_on = make_judge(loaded, arguments.eval_data, arguments.eval_tokens)
    with progress_bar() as progress:
        origin = stored_fingerprint(directory, loaded.tokenizer)
        result = quantize(loaded.model, chosen, calibration, judge, progress, origin)
    report = {
        "source": arguments.model,
        **result.to_dict(),
        "calibrated_on": calibrated_on,
        "compared_on": compared_on,
    }
    written, size = _write(arguments.out, arguments, loaded, directory, result, report)
    report = {"out": str(written), "file_bytes": size, **report}
    if arguments.json:
        print(json.dumps(report))
    else:
        _show(report, result)
    if written != arguments.out:
        say(f"{written} did not pass its comparison; see its report beside it")
        sys.exit(1)


def _check_out(out: Path, arguments: Arguments, in_gguf: bool) -> None:
    from mobilellm.atomic import check_destination, check_writable
    from mobilellm.model_directory import not_a_model_directory

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
    check_writable(out)


def _write(
    out: Path,
    arguments: Arguments,
    loaded: LoadedModel,
    directory: Path,
    result: Result,
    report: dict[str, Any],
) -> tuple[Path, int]:
    """Where the result lies now, and the bytes of the file that holds the weights.

    A .gguf file is compared with the model in memory in what runs it, as `export` does; its name is
    OUT.unverified where it did not pass.
    """
    from mobilellm.model.checkpoint import Weights, read_weights
    from mobilellm.model.quantized import WEIGHTS
    from mobilellm.quant.artefact import save

    if out.suffix != ".gguf":
        save(out, loaded.model, result.stored, loaded.tokenizer, report, arguments.overwrite, directory)
        return out, (out / WEIGHTS).stat().st_size
    from mobilellm.atomic import atomic_write
    from mobilellm.cli.comparison import unverified_told
    from mobilellm.export.export import export_source
    from mobilellm.export.source import source_of
    from mobilellm.export.targets import KINDS, Options

    weights = Weights(loaded.model.config, result.stored.tensors(), "", (), result.stored)
    source = source_of(arguments.model, directory, weights)
    with unverified_told(out, "the same command makes it again, and compares it"):
        exported = export_source(
            source, out, KINDS["gguf"], Options(), overwrite=arguments.overwrite,
            say=say,
            origin=source_of(arguments.model, directory, read_weights(directory, on_demand=True)),
        )  # fmt: skip
    with atomic_write(out.with_suffix(".quantization.json")) as temporary:
        temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return exported.path, exported.path.stat().st_size


def _show(report: dict[str, Any], result: Result) -> None:
    kind = result.stored.quantization
    rows = [
        ("model", f"{report['out']}, made of {report['source']} in {result.seconds:.1f} s"),
        ("scheme", f"{kind.scheme}: {kind.linear}, embedding and head {kind.embedding}, {result.method}"),
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
