"""A recipe's fields as the command line has them: batch.tokens_per_step is --batch.tokens-per-step there.

What trains says which field is wrong and what would do; who typed a command reads of flags. What is wrong
with a recipe's file is told by the names that stand in it.
"""

from __future__ import annotations

import re
from dataclasses import fields, is_dataclass
from functools import cache
from typing import get_args, get_type_hints

from mobilellm.train.recipe import Recipe, RecipeError


def in_flags(error: Exception, message: str) -> str:
    """`message`, which tells `error`, with flags in place of dotted names; "name = value" as it is typed."""
    if isinstance(error, RecipeError):
        return message
    return _pattern().sub(_flag, message).replace("missing key --", "missing --")


def _flag(found: re.Match[str]) -> str:
    name, value = found["name"].replace("_", "-"), found["value"]
    if value in ("true", "True"):
        return f"--{name}"
    if value in ("false", "False"):
        return f"--{name.replace('.', '.no-', 1)}"
    if value is not None:  # a list
        return f"--{name} {value.strip('[]').replace(',', '').replace(chr(39), '')}"
    return f"--{name} " if found["said"] else f"--{name}"


@cache
def _pattern() -> re.Pattern[str]:
    """A dotted field of a recipe, not in a path or in a flag; "= " where its value follows."""
    names = "|".join(re.escape(name) for name in sorted(_leaves(), key=len, reverse=True))
    is_said = r"(?P<said> = (?P<value>[tT]rue\b|[fF]alse\b|\[[^\]]*\])?)?"
    return re.compile(rf"(?<![\w./-])(?P<name>{names})(?!\w|\.\w){is_said}")


def _leaves() -> list[str]:
    """TABLE.FIELD of every field of every table."""
    hints = get_type_hints(Recipe)
    tables = {
        each.name: kind
        for each in fields(Recipe)
        for kind in (hints[each.name], *get_args(hints[each.name]))
        if is_dataclass(kind)
    }
    return [f"{name}.{leaf.name}" for name, table in tables.items() for leaf in fields(table)]
