"""Look at the text of the batch at which a run was stopped, by the address in RUN/bad-batch.json.

    mobilellm data batch runs/tiny

The run's data must still be where its recipe says.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import tyro

from mobilellm.chat.visible import visible
from mobilellm.cli import run_parts
from mobilellm.cli.data import spelt
from mobilellm.train.recipe import load_recipe

if TYPE_CHECKING:
    from mobilellm.data.loader import Batch


@dataclass(frozen=True)
class Arguments:
    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    """Folder of the run."""
    number: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 3
    """How many of the batch's sequences."""
    skip: int = 0
    """Pass over so many first."""
    json: bool = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    for name, value in (("number", arguments.number), ("skip", arguments.skip)):
        if value < 0:
            raise ValueError(f"data batch: {name} = {value} must be 0 or above")
    told = _told(arguments.run / "bad-batch.json")
    text = run_parts.text(load_recipe(arguments.run / "recipe.toml"))
    batch = _batch(text, told["batch"])
    rows = range(arguments.skip, min(arguments.skip + arguments.number, len(batch.tokens)))
    shown: list[dict[str, Any]] = [
        {
            "sequence": row + 1,
            "targets": int((batch.weights[row] > 0).sum()),
            "text": spelt(text.tokenizer, _read_in(batch, row)),
        }
        for row in rows
    ]
    told |= {"sequences": len(batch.tokens), "length": batch.tokens.shape[1]}
    if arguments.json:
        print(json.dumps(told | {"shown": shown}))
        return
    print(f"step {told['step']}: {told['reason']}\n")
    for each in shown:
        head = f"sequence {each['sequence']:,} of {told['sequences']:,}: {each['targets']:,} targets count"
        print(f"{head}\n{visible(each['text'])}\n")
    if rest := len(batch.tokens) - rows.stop:
        print(f"{rest:,} more: --skip {rows.stop}, or a larger -n")


def _read_in(batch: Batch, row: int) -> list[int]:
    """A row's tokens up to the last target that counts: nothing after it, padding mostly, is in the loss.

    Where conversations share a row, the last token of each is a target alone, and stands in its place.
    """
    counted = np.flatnonzero(batch.weights[row])
    end = int(counted[-1]) + 1 if counted.size else 0
    tokens, targets = batch.tokens[row, :end].tolist(), batch.targets[row, :end].tolist()
    read: list[int] = []
    for token, target, following in zip(tokens, targets, [*tokens[1:], None], strict=True):
        read += [token] if target == following else [token, target]
    return read


def _told(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not there; a run that its guard has stopped leaves one")
    try:
        told = json.loads(file.read_text("utf-8"))
        if isinstance(told["batch"], dict) and {"step", "reason"} <= told.keys():
            return dict(told)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise ValueError(f"{file}: not what a run writes there; start the run again, which stops there again")


def _batch(text: run_parts.RunText, address: dict[str, Any]) -> Batch:
    """All of a step's sequences, whatever the number of devices that shared them."""
    from mobilellm.train.distributed import World

    text.read(quiet=True)
    loader = text.loader(World())
    loader.restore(address.get("rows", {}) if "distill" in address else address)
    return loader.next()
