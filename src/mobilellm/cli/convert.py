"""Read a checkpoint in any official layout and write one clean directory.

Clean means: safetensors with the tied tensor stored once, a tokenizer.json verified against tokenizer.model,
and a generation config whose pad is not eos. The result is read back and compared before it gets its name.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mobilellm.cli.notices import say


@dataclass
class Arguments:
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SRC")]
    """Model directory, training run, or Hub id (org/name)."""
    destination: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DST")]
    """Directory to write; it appears whole or not at all."""
    to: Literal["llama", "mobilellm"]
    """llama loads in stock transformers and other tools; mobilellm can share layers and carries its code."""
    dtype: str | None = None
    """float32, bfloat16 or float16; by default as stored."""
    unroll: bool = False
    """Store every executed step as a block of its own, so that a shared model fits the llama layout."""
    overwrite: bool = False
    """Replace a model directory; the old one goes only when the new one is complete."""
    json: bool = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    from mobilellm.atomic import check_destination
    from mobilellm.model.convert import convert
    from mobilellm.model_directory import not_a_model_directory

    check_destination(arguments.destination, arguments.overwrite, not_a_model_directory)
    done = convert(
        arguments.source,
        arguments.destination,
        layout=arguments.to,
        dtype=arguments.dtype,
        unrolled=arguments.unroll,
        overwrite=arguments.overwrite,
        say=say,
    )
    if arguments.json:
        for repair in done["repairs"]:
            say(f"{arguments.source}: repaired: {repair}")
        print(json.dumps(done))
        return
    repairs, licence = done.pop("repairs"), done.pop("licence")
    rows = [*done.items(), *(("repaired", repair) for repair in repairs or ["nothing"])]
    rows.append(
        ("licence", f"{licence or 'not stated by the source'}; what holds for it holds for the result")
    )
    for key, value in rows:
        print(f"{key:<20} {value}")
