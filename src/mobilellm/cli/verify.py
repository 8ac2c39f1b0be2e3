"""Compare an artefact with the model it was made of, in its own runtime on real text.

Each check has a name, a figure and a bar. The report is saved as ARTEFACT.verify.json; an artefact called
NAME.unverified takes its name when it passes. Exit code 1: a check failed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from mobilellm.cli.comparison import Comparison, show
from mobilellm.cli.notices import say


@dataclass(frozen=True)
class Arguments:
    artefact: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="ARTEFACT")]
    """File or directory that `mobilellm export` wrote."""
    against: str
    """The model it was made of: model directory, training run, or Hub id (org/name)."""
    comparison: Annotated[Comparison, tyro.conf.arg(name="")] = field(default_factory=Comparison)
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
        arguments.comparison.settings(),
        arguments.overwrite,
        say,
    )
    show(exported, kind, arguments.json)
