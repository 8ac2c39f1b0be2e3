"""Write a model as the one file that a device runs.

OUT.gguf holds weights, tokenizer and chat template. `mobilellm generate OUT.gguf` runs it without torch; a
model without layer sharing runs in llama.cpp and all that is built on it, too. A shared model keeps its
blocks once, and readers that do not know about sharing refuse it; --unroll stores every step for them.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mobilellm.cli.tables import print_notes, print_sheet

Kind = Literal["f32", "f16", "bf16", "q8_0", "q4_0"]


@dataclass(frozen=True)
class Arguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Model directory, training run, or Hub id (org/name)."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT.gguf")]
    """File to write; it appears whole or not at all."""
    type: Kind | None = None
    """How the blocks' matrices are stored: q8_0 takes 8.5 bits a weight, q4_0 4.5. By default q8_0; a model
    made by `mobilellm quantize` keeps what it has."""
    embedding_type: Kind | None = None
    """How embedding and head are stored; by default as the rest."""
    unroll: tyro.conf.FlagCreatePairsOff[bool] = False
    """Store a shared block once for every time it runs, for llama.cpp: the file grows as often."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace OUT.gguf if it is there."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    from mobilellm.export.to_gguf import export_gguf
    from mobilellm.gguf import read_gguf
    from mobilellm.gguf_model import read_config

    _check_out(arguments.out, arguments.overwrite)
    wider = export_gguf(
        arguments.model, arguments.out, arguments.type, arguments.embedding_type, arguments.unroll, _say
    )
    file = read_gguf(arguments.out)
    config = read_config(file)
    architecture = file.metadata["general.architecture"]
    if arguments.json:
        described = {
            "file": str(arguments.out),
            "bytes": arguments.out.stat().st_size,
            "architecture": architecture,
            "stored_blocks": config.num_layers,
            "executed_blocks": config.num_steps,
            "bytes_by_type": file.bytes_by_type,
            "wider": wider,
        }
        print(json.dumps(described))
        return
    blocks = f"{config.num_layers} stored"
    if config.shares_layers:
        blocks += f", {config.num_steps} executed"
    print_sheet(
        [
            ("file", f"{arguments.out}, {arguments.out.stat().st_size:,} B"),
            ("architecture", architecture),
            ("blocks", blocks),
            *(("tensors", f"{name}: {size:,} B") for name, size in file.bytes_by_type.items()),
        ]
    )
    notes = [f"{name} is stored as F16: {reason}" for name, reason in wider.items()]
    if config.shares_layers:
        notes.append(
            "Blocks are shared: this package runs the file, llama.cpp refuses it. For llama.cpp: --unroll."
        )
    print_notes(
        [*notes, "Not yet compared with its source in the runtime; try: mobilellm generate, eval ppl."]
    )


def _check_out(out: Path, overwrite: bool) -> None:
    if out.suffix != ".gguf":
        raise ValueError(f"{out}: the name of the file must end in .gguf")
    if out.is_dir():
        raise IsADirectoryError(f"{out}: is a directory; name a file")
    if out.exists() and not overwrite:
        raise FileExistsError(f"{out}: exists; choose another name or pass --overwrite")


def _say(message: str) -> None:
    print(f"mobilellm: {message}", file=sys.stderr)
