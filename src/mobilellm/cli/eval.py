"""What a model is worth, by protocols with a name."""

from __future__ import annotations

from typing import Annotated

import tyro

from mobilellm.cli.eval_ppl import Ppl, run_ppl
from mobilellm.cli.eval_zero_shot import ZeroShot, run_zero_shot

Arguments = (
    Annotated[Ppl, tyro.conf.subcommand("ppl")] | Annotated[ZeroShot, tyro.conf.subcommand("zero-shot")]
)


def run(arguments: Ppl | ZeroShot) -> None:
    match arguments:
        case Ppl():
            run_ppl(arguments)
        case ZeroShot():
            run_zero_shot(arguments)
