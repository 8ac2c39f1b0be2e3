"""Write a model as what a device runs, compare it with its source there, and only then give it its name.

The target is told by OUT's name or by --to. gguf: one file for this package's runtime, llama.cpp and Ollama.
hf: a directory for transformers, a plain Llama that needs no code of ours. The artefact is run in its own
runtime on real text; one that fails a check, or was not compared, is called OUT.unverified. A shared model
keeps its blocks once where the target can say so; --unroll stores every step, for readers without sharing.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mobilellm.cli.comparison import Comparison, show, unverified_told
from mobilellm.cli.notices import say
from mobilellm.export.targets import KINDS, Options, kind_for, target_of, unverified_name
from mobilellm.installation import program


@dataclass(frozen=True)
class Arguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Model directory, training run, or Hub id (org/name)."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """File or directory to write; it appears whole or not at all."""
    to: Annotated[str | None, tyro.conf.arg(metavar="{" + ",".join(KINDS) + "}")] = None
    """Target; by default what OUT's name ends in."""
    options: Annotated[Options, tyro.conf.arg(name="")] = field(default_factory=Options)
    verify: bool = True
    """Compare with the source in the artefact's runtime; without, its name stays OUT.unverified."""
    comparison: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace OUT if it is there."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    if arguments.to is not None:
        target_of(arguments.to)
    kind = KINDS[arguments.to] if arguments.to else kind_for(arguments.out)
    from mobilellm.export.export import export

    settings = arguments.comparison.settings()
    unverified = shlex.quote(str(unverified_name(arguments.out)))
    verify = f"{program()} verify {unverified} --against {shlex.quote(arguments.model)}"
    with unverified_told(arguments.out, f"{verify} does that"):
        exported = export(
            arguments.model,
            arguments.out,
            kind,
            arguments.options,
            settings,
            arguments.verify,
            arguments.overwrite,
            say,
        )
    show(exported, kind, arguments.json)
