"""All schemes and methods on one model: a table, JSON and a picture of size against quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mobilellm.cli.notices import say
from mobilellm.cli.quantize_parts import load_source, make_calibration, make_judge, progress_bar
from mobilellm.cli.tables import print_notes, print_table

if TYPE_CHECKING:
    from mobilellm.cli.quantize import Arguments

_SWEEP = (  # scheme, embedding, method
    ("q8_0", None, "rtn"),
    ("int8", None, "rtn"),
    ("w8a8", None, "rtn"),
    ("8da4w", None, "rtn"),
    ("8da4w", None, "gptq"),
    ("8da4w", "int4", "rtn"),
    ("8da4w", "int4", "gptq"),
    ("q4_0", "q8_0", "rtn"),
    ("q4_0", "q8_0", "gptq"),
    ("q4_0", None, "rtn"),
    ("q4_0", None, "gptq"),
)
_HEADER = (
    "scheme", "embedding", "method", "bits/weight", "MB", "perplexity", "change", "bits/byte", "KL",
    "same token", "seconds",
)  # fmt: skip
_FILES = ("sweep.json", "sweep.md", "sweep.png")


def sweep(arguments: Arguments) -> None:
    """Writes sweep.json, sweep.md and sweep.png; prints the table, or the JSON."""
    from mobilellm.atomic import atomic_write
    from mobilellm.quant.quantize import quantize
    from mobilellm.quant.schemes import scheme
    from mobilellm.report.quantization import Spot, sweep_picture

    folder = _checked(arguments)
    loaded, _ = load_source(arguments.model)
    judge, compared_on = make_judge(loaded, arguments.eval_data, arguments.eval_tokens)
    assert judge is not None
    calibration, calibrated_on = make_calibration(
        loaded, arguments.calibration, arguments.calibration_tokens, arguments.act_order
    )
    results = []
    for number, (name, embedding, method) in enumerate(_SWEEP):
        with progress_bar(f"{number + 1} of {len(_SWEEP)}: {name} {method}, ") as progress:
            chosen = scheme(name, embedding)
            given = calibration if method == "gptq" else None
            results.append(quantize(loaded.model, chosen, given, judge, progress).to_dict())
    source = results[0]["comparison"]["source"]
    size = sum(parameter.numel() for parameter in loaded.model.parameters())
    report = {
        "source": {"name": arguments.model, "parameters": size, **source},
        "calibrated_on": calibrated_on,
        "compared_on": compared_on,
        "results": results,
    }
    rows = [_row(each) for each in results]
    spots = [
        Spot(_label(each), each["method"], each["bytes"], each["comparison"]["kl"], _perplexity(each))
        for each in results
    ]
    picture = sweep_picture(spots, source["perplexity"], f"{arguments.model}: {', '.join(compared_on)}")
    contents = ((json.dumps(report, indent=2) + "\n").encode(), _markdown(rows).encode(), picture)
    for name, content in zip(_FILES, contents, strict=True):
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
    if arguments.json:
        print(json.dumps(report))
        return
    print_table(_HEADER, rows)
    tokens = results[0]["comparison"]["tokens"]
    print_notes(
        [
            f"Source: perplexity {source['perplexity']:.4f}, {source['bits_per_byte']:.4f} bits a byte, over "
            f"{tokens:,} tokens of {', '.join(compared_on)}.",
            f"Written: {', '.join(str(folder / name) for name in _FILES)}",
        ]
    )


def _checked(arguments: Arguments) -> Path:
    """The folder. Raises ValueError or FileExistsError for what does not go with a sweep."""
    folder = arguments.sweep
    assert folder is not None
    if arguments.out is not None:
        raise ValueError(f"--sweep writes no model; leave {arguments.out} out, or --sweep")
    if arguments.eval_tokens < 1:
        raise ValueError(f"eval_tokens = {arguments.eval_tokens} leaves a sweep nothing to compare on")
    for option in ("embedding", "group"):
        if getattr(arguments, option) is not None:
            raise ValueError(f"--{option} is for one scheme; leave it out of a sweep")
    if arguments.kv != "float":
        raise ValueError("--kv is for one scheme; leave it out of a sweep")
    there = [name for name in _FILES if (folder / name).exists()]
    if there and not arguments.overwrite:
        raise FileExistsError(f"{folder / there[0]}: exists; choose another folder or pass --overwrite")
    say(f"{len(_SWEEP)} schemes and methods; the calibrated ones take longest")
    return folder


def _row(result: dict[str, Any]) -> list[str]:
    found = result["comparison"]
    return [
        result["scheme"],
        result["embedding"],
        result["method"],
        f"{result['bits_per_weight']:.2f}",
        f"{result['bytes'] / 1e6:.2f}",
        f"{_perplexity(result):.3f}",
        f"{100 * (found['perplexity_ratio'] - 1):+.2f} %",
        f"{found['quantized']['bits_per_byte']:.4f}",
        f"{found['kl']:.5f}",
        f"{100 * found['top1_agreement']:.2f} %",
        f"{result['seconds']:.1f}",
    ]


def _label(result: dict[str, Any]) -> str:
    own = {"8da4w": "int8"}.get(result["scheme"], result["linear"])
    return (
        result["scheme"] if result["embedding"] == own else f"{result['scheme']}, head {result['embedding']}"
    )


def _perplexity(result: dict[str, Any]) -> float:
    value: float = result["comparison"]["quantized"]["perplexity"]
    return value


def _markdown(rows: list[list[str]]) -> str:
    lines = [list(_HEADER), ["---"] * 3 + ["---:"] * (len(_HEADER) - 3), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
