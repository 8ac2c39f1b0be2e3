"""What a model is worth, by protocols with a name."""

from __future__ import annotations

from typing import Annotated

import tyro

from mobilellm.cli.eval_zero_shot import ZeroShot, run_zero_shot

Arguments = Annotated[ZeroShot, tyro.conf.subcommand("zero-shot")]


def run(arguments: ZeroShot) -> None:
    match arguments:
        case ZeroShot():
            run_zero_shot(arguments)
