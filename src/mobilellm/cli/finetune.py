"""Fine-tune a model on conversations. The same command goes on where it stopped.

    mobilellm finetune MODEL --chat.train conversations.jsonl --out runs/chat
    mobilellm chat runs/chat

It is `mobilellm train RECIPE --model.init-from MODEL`: every leaf of the recipe is a flag.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated

import tyro

from mobilellm.cli import recipe_flags, train
from mobilellm.train.recipe import with_tables

_RECIPE = "sft-cpu"
in_flags = recipe_flags.in_flags  # by which main tells what went wrong


@dataclass(frozen=True, kw_only=True)
class Arguments(train.RunFlags):
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Model directory, run, or Hub id to start from. It must come first."""
    recipe: str = _RECIPE
    """Name of a recipe of the package, or a TOML file: sft-cpu for small models, sft, api-calling."""
    out: Path = field(default=Path("runs/finetune"))
    """Folder of the run: checkpoints, metrics, the model at the end."""


def default_arguments(rest: Sequence[str]) -> Arguments:
    """Arguments with the recipe's values, which flags then override."""
    name = _recipe_named(rest)
    recipe = train.recipe_named(name)
    if recipe.chat is None:
        raise ValueError(f"finetune: recipe {name} trains on shards, not on conversations; train runs it")
    recipe = with_tables(recipe, train.tables_named(rest))
    if rest and not rest[0].startswith("-"):
        recipe = replace(recipe, model=replace(recipe.model, init_from=Path(rest[0])))
        train.refuse_texts(f"finetune {rest[0]}", rest[1:], "--chat.train FILE")
        return Arguments(model=rest[0], settings=recipe)
    if {"-h", "--help"} & set(rest):
        return Arguments(model="MODEL", settings=recipe)
    raise ValueError("finetune: name a model first, then --chat.train and the files of conversations")


def run(arguments: Arguments) -> None:
    shared = {each.name: getattr(arguments, each.name) for each in fields(arguments) if each.name != "model"}
    train.run(train.Arguments(**shared))


def _recipe_named(rest: Sequence[str]) -> str:
    for word, following in itertools.pairwise([*rest, ""]):
        if word == "--recipe":
            return following or _RECIPE  # nothing follows: the flags are refused for it
        if word.startswith("--recipe="):
            return word.partition("=")[2]
    return _RECIPE
