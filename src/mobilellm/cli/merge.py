"""Fold an adapter into the model it was trained on: one clean directory, for everything that takes a model.

    mobilellm merge runs/lora --out models/mine

The adapter is that of a run with [lora], or any LoRA or DoRA that peft saved for such a model. Weights that
it was not trained on are refused. Chat template and tokenizer are carried along.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mobilellm.cli.notices import say
from mobilellm.installation import program


@dataclass
class Arguments:
    adapter: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="ADAPTER")]
    """A training run that has an adapter, the adapter's directory, or a Hub id (org/name)."""
    out: Path
    """Directory to write; it appears whole or not at all."""
    model: str | None = None
    """The model it was trained on (directory, run or Hub id); by default where the adapter says it was."""
    dtype: str = "float32"
    """Of the result: float32, bfloat16 or float16. A small change of a weight may get lost in 16 bits."""
    overwrite: bool = False
    """Replace a model directory; the old one goes only when the new one is complete."""
    json: bool = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    from mobilellm import hub
    from mobilellm.atomic import check_destination
    from mobilellm.licence import licence_files
    from mobilellm.model import checkpoint
    from mobilellm.model.adapter_files import merge_adapter
    from mobilellm.model_directory import CONFIG, not_a_model_directory

    check_destination(arguments.out, arguments.overwrite, not_a_model_directory)
    dtype = checkpoint.torch_dtype(arguments.dtype)
    directory = hub.resolve(arguments.adapter, say)
    if (directory / CONFIG).is_file():
        raise ValueError(f"{arguments.adapter}: is a whole model already; there is nothing to merge")
    done = merge_adapter(directory, arguments.model, say)
    checkpoint.save(
        arguments.out,
        done.model.to(dtype),
        done.tokenizer,
        overwrite=arguments.overwrite,
        further_files=licence_files(done.base),
        chat_template=done.chat_template,
    )
    result = {
        "adapter": str(directory),
        "base": str(done.base),
        "out": str(arguments.out),
        "dtype": arguments.dtype,
        "parameters": sum(parameter.numel() for parameter in done.model.parameters()),
        "chat_template": done.chat_template is not None,
        "repairs": list(done.repairs),
    }
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{directory} merged into {done.base}: {arguments.out}, {arguments.dtype}")
    what = "chat" if done.chat_template else "generate"
    out, file = shlex.quote(str(arguments.out)), shlex.quote(f"{arguments.out}.gguf")
    print(f"Go on:\n  {program()} {what} {out}\n  {program()} export {out} {file}")
