"""A recipe: everything a run needs, as one TOML file. Strict: every leaf is known, typed and read."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mobilellm.train.distillation import DistillChoice
from mobilellm.train.lora import LoraChoice
from mobilellm.train.qat import QatChoice
from mobilellm.train.settings import TrainSettings
from mobilellm.train.tables import OVER_LONG, ChatChoice, DataChoice, LogChoice, ModelChoice, SampleChoice


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names file, field, value and mend."""


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainSettings):
    """Model, data and logging on top of what the loop reads.

    A table that is None is a kind of run that this one is not: it is there when a file or a flag names it.
    """

    steps: int = 0
    """Optimiser steps of the whole run, at most those of `epochs` where that is given."""
    epochs: float = 0.0
    """How often the data is seen, in place of steps or as a bound to them; 0: as `steps` says."""
    model: ModelChoice
    data: DataChoice = field(default_factory=DataChoice)
    chat: ChatChoice | None = None
    distill: DistillChoice | None = None
    lora: LoraChoice | None = None
    qat: QatChoice | None = None
    sample: SampleChoice = field(default_factory=SampleChoice)
    log: LogChoice = field(default_factory=LogChoice)

    def _problems(self) -> list[str]:
        problems = super()._problems()
        problems += self._source_problems() + self._lora_problems()
        if self.distill is not None:
            problems += self.distill.problems()
        if self.qat is not None:
            problems += self.qat.problems(self.steps, self.compute.strategy)
        if self.qat is not None and self.lora is not None:
            problems.append(
                "qat and lora exclude each other: an export holds weights and adapters in one; merge those "
                "first, then train with qat"
            )
        for name, value, least in (
            ("data.held_out_tokens", self.data.held_out_tokens, 2),  # one alone predicts nothing
            ("sample.tokens", self.sample.tokens, 1),
        ):
            if value < least:
                problems.append(f"{name} = {value} must be at least {least}")
        if not self.sample.temperature >= 0:
            problems.append(f"sample.temperature = {self.sample.temperature} must be 0 or above")
        if self.log.tracker not in ("none", "trackio", "wandb"):
            problems.append(f"log.tracker = {self.log.tracker!r} must be none, trackio or wandb")
        return problems

    def _rules(self) -> Iterator[tuple[str, Callable[[Any], bool], str]]:
        by_epochs = self.epochs > 0
        for name, good, text in super()._rules():
            if name != "steps":
                yield name, good, text
        yield "epochs", lambda value: value >= 0, f"epochs = {self.epochs} must be 0 or above"
        yield (
            "steps",
            lambda value: value > 0 or (by_epochs and value == 0),
            (f"steps = {self.steps} must be above 0" + ("" if by_epochs else ", unless epochs are given")),
        )

    def _lora_problems(self) -> list[str]:
        if self.lora is None:
            return []
        problems = self.lora.problems()
        if self.model.init_from is None:
            problems.append("missing key model.init_from; lora adapts a model that is trained")
        if self.optim.name == "muon":
            problems.append("optim.name = 'muon' is for whole matrices, not for lora; use 'adamw'")
        if self.compute.strategy == "fsdp":
            problems.append(
                "compute.strategy = 'fsdp' does not go with lora, which has little to split; use 'ddp'"
            )
        return problems

    def _source_problems(self) -> list[str]:
        """What is wrong with where the model and the text come from."""
        problems, data = [], self.data
        if self.chat is None and self.model.preset is None and self.model.init_from is None:
            problems.append("missing key model.preset, or model.init_from to start from a model")
        if self.chat is not None:
            if data != DataChoice():
                problems.append("data and chat exclude each other; train on shards or on conversations")
            if self.model.init_from is None:
                problems.append("missing key model.init_from; a chat model is made of one with a tokenizer")
            return problems + _chat_problems(self.chat)
        if not data.train:
            problems.append("data.train is empty; name at least one folder of shards")
        if data.weights and len(data.weights) != len(data.train):
            problems.append(
                f"data.weights has {len(data.weights)} numbers, data.train {len(data.train)} names"
            )
        if not all(0 < weight < math.inf for weight in data.weights):
            problems.append(f"data.weights = {list(data.weights)} must all be above 0")
        return problems


def with_steps(recipe: Recipe, sequences: int) -> Recipe:
    """The recipe with its steps settled, for data of so many sequences an epoch."""
    if not recipe.epochs:
        return recipe
    steps = max(1, math.ceil(recipe.epochs * sequences / recipe.batch.sequences_per_step))
    return replace(recipe, steps=min(steps, recipe.steps or steps))


def with_tables(recipe: Recipe, names: Iterable[str]) -> Recipe:
    """The recipe with these tables, as they are by default where it lacks them; names of others are left."""
    missing = {
        each.name: kind()
        for each, kind in ((each, _table(get_type_hints(Recipe)[each.name])) for each in fields(Recipe))
        if each.name in names and kind is not None and getattr(recipe, each.name) is None
    }
    widened = copy(recipe)  # not checked: the flags that follow may name what a table needs
    for name, value in missing.items():
        object.__setattr__(widened, name, value)
    return widened


def _chat_problems(chat: ChatChoice) -> list[str]:
    problems = []
    if not chat.train:
        problems.append("chat.train is empty; name at least one file of conversations")
    if not 0 <= chat.held_out_fraction < 1:
        problems.append(f"chat.held_out_fraction = {chat.held_out_fraction} must be 0 or above, below 1")
    if chat.held_out_tokens < 1:
        problems.append(f"chat.held_out_tokens = {chat.held_out_tokens} must be at least 1")
    if chat.over_long not in OVER_LONG:
        problems.append(f"chat.over_long = {chat.over_long!r} must be {' or '.join(OVER_LONG)}")
    return problems


def recipe_names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    folder = files("mobilellm") / "recipes"
    return tuple(
        sorted(item.name.removesuffix(".toml") for item in folder.iterdir() if item.name.endswith(".toml"))
    )


def load_recipe(name: str | Path) -> Recipe:
    """A recipe by its name in the package or by the path of a TOML file.

    Paths in the file are relative to the current directory. Raises FileNotFoundError, RecipeError.
    """
    if str(name) in recipe_names():
        return parse_recipe((files("mobilellm") / "recipes" / f"{name}.toml").read_text("utf-8"), str(name))
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError(
            f"{name}: no such recipe file; recipes of the package are {', '.join(recipe_names())}"
        )
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not UTF-8 text, so no TOML") from None
    return parse_recipe(text, str(path))


def parse_recipe(text: str, source: str) -> Recipe:
    """A recipe from TOML text; `source` names it in errors. Unknown and missing keys come in one error."""
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source}: not TOML ({error})") from None
    problems: list[str] = []
    built = _build(Recipe, values, "", problems)
    if problems:
        raise RecipeError(f"{source}: {'; '.join(problems)}")
    try:
        recipe = built()
    except ValueError as error:
        raise RecipeError(f"{source}: {str(error).removeprefix('train: ')}") from None
    assert isinstance(recipe, Recipe)
    return recipe


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML that `parse_recipe` reads back equal: what a run keeps beside its results."""
    lines, tables = list[str](), list[str]()
    for each in fields(recipe):
        value = getattr(recipe, each.name)
        if value is None:
            continue
        if is_dataclass(value):
            inner = [
                f"{leaf.name} = {_toml(getattr(value, leaf.name))}"
                for leaf in fields(value)
                if getattr(value, leaf.name) is not None
            ]
            tables += ["", f"[{each.name}]", *inner]
        else:
            lines.append(f"{each.name} = {_toml(value)}")
    return "\n".join([*lines, *tables]) + "\n"


def _build(kind: Any, values: Mapping[str, Any], prefix: str, problems: list[str]) -> Any:
    """A function that makes `kind` from TOML values; what is wrong with the keys goes to `problems`."""
    hints = get_type_hints(kind)
    known = {each.name: each for each in fields(kind)}
    for name in values.keys() - known.keys():
        problems.append(f"unknown key {prefix}{name} (known here: {', '.join(known)})")
    arguments: dict[str, Any] = {}
    for name, each in known.items():
        if name not in values:
            if each.default is MISSING and each.default_factory is MISSING:
                problems.append(f"missing key {prefix}{name}")
        elif (table := _table(hints[name])) is not None:
            if isinstance(values[name], Mapping):
                arguments[name] = _build(table, values[name], f"{prefix}{name}.", problems)
            else:
                problems.append(f"{prefix}{name} = {values[name]!r} must be a table")
        else:
            try:
                arguments[name] = _converted(hints[name], values[name])
            except TypeError as error:
                problems.append(f"{prefix}{name} = {values[name]!r} must be {error}")
    return lambda: kind(**{name: value() if callable(value) else value for name, value in arguments.items()})


def _table(kind: Any) -> Any:
    """The dataclass of a field that is one, or may be one; None of any other field."""
    return next((each for each in (kind, *get_args(kind)) if is_dataclass(each)), None)


def _converted(kind: Any, value: Any) -> Any:
    """A TOML value as the field's type. Raises TypeError whose text names the type."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise TypeError("a list")
        return tuple(_converted(get_args(kind)[0], item) for item in value)
    choices = [each for each in get_args(kind) if each is not type(None)] or [kind]
    (wanted,) = choices
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise TypeError("a path" if wanted is Path else f"of type {wanted.__name__}")
    return value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str | Path):
        return _quoted(str(value))
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return (
        '"'
        + "".join(
            character if character >= " " and character != "\x7f" else f"\\u{ord(character):04x}"
            for character in escaped
        )
        + '"'
    )
