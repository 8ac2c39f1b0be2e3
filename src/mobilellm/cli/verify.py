"""Compare an artefact with the model it was made of, in its own runtime on real text.

Each check has a name, a figure and a bar. The report is saved as ARTEFACT.verify.json; an artefact called
NAME.unverified takes its name when it passes. Exit code 1: a check failed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mobilellm.cli.artefact import described, print_exported, settings_of
from mobilellm.cli.notices import say


@dataclass(frozen=True)
class Arguments:
    artefact: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ARTEFACT")]
    """File or directory that `mobilellm export` wrote."""
    against: str
    """The model it was made of: model directory, training run, or Hub id (org/name)."""
    text: Path | None = None
    """Text file to compare on; by default the documentation that every Python carries."""
    tokens: int | None = None
    """Tokens of it whose logits are compared (default 512)."""
    runtime: str | None = None
    """What runs it, e.g. engine or llama.cpp; by default all that can and are installed."""
    origin: str | None = None
    """Of a quantised MODEL what it was made of, to measure the distance from that, too; by default what it
    names itself, if that is still there."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Let NAME.unverified take the name of a NAME that is there."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    from mobilellm.export.export import verify_artefact
    from mobilellm.export.targets import kind_of

    kind = kind_of(arguments.artefact)
    exported = verify_artefact(
        arguments.artefact,
        arguments.against,
        settings_of(arguments.text, arguments.tokens, arguments.runtime, arguments.origin),
        arguments.overwrite,
        say,
    )
    if arguments.json:
        print(json.dumps(described(exported, kind)))
    else:
        print_exported(exported, kind)
    if exported.report is not None and not exported.report.passed:
        sys.exit(1)
