"""Evaluation: the model card's tables rerun, and records compared."""

from __future__ import annotations

from typing import Annotated

import tyro

from mobilellm.cli.eval_compare import Compare, run_compare
from mobilellm.cli.eval_table import Table, run_table

Arguments = (
    Annotated[Table, tyro.conf.subcommand("table")] | Annotated[Compare, tyro.conf.subcommand("compare")]
)


def run(arguments: Table | Compare) -> None:
    match arguments:
        case Table():
            run_table(arguments)
        case Compare():
            run_compare(arguments)
