"""What a model is worth, by protocols with a name: perplexity, zero-shot tasks, tool calling, chat."""

from __future__ import annotations

from typing import Annotated

import tyro

from mobilellm.cli.eval_chat import Chat, run_chat
from mobilellm.cli.eval_compare import Compare, run_compare
from mobilellm.cli.eval_ppl import Ppl, run_ppl
from mobilellm.cli.eval_table import Table, run_table
from mobilellm.cli.eval_tools import Tools, run_tools
from mobilellm.cli.eval_zero_shot import ZeroShot, run_zero_shot

Arguments = (
    Annotated[Ppl, tyro.conf.subcommand("ppl")]
    | Annotated[ZeroShot, tyro.conf.subcommand("zero-shot")]
    | Annotated[Tools, tyro.conf.subcommand("tools")]
    | Annotated[Chat, tyro.conf.subcommand("chat")]
    | Annotated[Table, tyro.conf.subcommand("table")]
    | Annotated[Compare, tyro.conf.subcommand("compare")]
)


def run(arguments: Ppl | ZeroShot | Tools | Chat | Table | Compare) -> None:
    match arguments:
        case Ppl():
            run_ppl(arguments)
        case ZeroShot():
            run_zero_shot(arguments)
        case Tools():
            run_tools(arguments)
        case Chat():
            run_chat(arguments)
        case Table():
            run_table(arguments)
        case Compare():
            run_compare(arguments)
