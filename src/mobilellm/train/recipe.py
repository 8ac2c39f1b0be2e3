"""A recipe: everything a run needs, as one TOML file. Strict: every leaf is known, typed and read."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from mobilellm.config import ModelConfig
from mobilellm.presets import preset
from mobilellm.train.qat import QatChoice
from mobilellm.train.settings import TrainSettings


class RecipeError(ValueError):
    """A recipe that cannot be run; the message names file, field, value and mend."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """The architecture: a preset, and what differs from it. The vocabulary is the tokenizer's by default."""

    preset: str
    """Name of a preset: `mobilellm info` lists them."""
    init_from: Path | None = None
    """Start from the weights of this model (directory, run or Hub id); its shape must be this one."""
    vocab_size: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int | None = None
    rope_theta: float | None = None
    rms_norm_eps: float | None = None
    initializer_range: float | None = None
    tie_word_embeddings: bool | None = None
    repeats: int | None = None
    order: str | None = None

    def config(self, tokenizer_vocab_size: int | None = None) -> ModelConfig:
        """The ModelConfig meant. Raises ValueError, e.g. for an unknown preset."""
        changes = {
            name: value
            for name in (each.name for each in fields(ModelConfig))
            if (value := getattr(self, name)) is not None
        }
        if tokenizer_vocab_size is not None:
            changes.setdefault("vocab_size", tokenizer_vocab_size)
        return replace(preset(self.preset), **changes)


@dataclass(frozen=True, kw_only=True)
class DataChoice:
    train: tuple[Path, ...]
    """Folders of shards (`mobilellm prepare`), all of one tokenizer."""
    weights: tuple[float, ...] = ()
    """Share of each folder in the mixture; by default each as large as it is."""
    held_out: tuple[Path, ...] = ()
    """Folders whose held-out split is evaluated; by default those of `train`."""
    held_out_tokens: int = 1_000_000
    """Evaluate at most this many tokens of each, from the start."""
    document_mask: bool = False
    """No attention across documents in a packed sequence; positions restart at each, and its BOS is no
    target. Evaluations do the same."""


@dataclass(frozen=True, kw_only=True)
class SampleChoice:
    prompts: tuple[str, ...] = ()
    """Texts completed at every evaluation, to see what the model says."""
    tokens: int = 40
    """New tokens for each."""
    temperature: float = 0.7


@dataclass(frozen=True, kw_only=True)
class LogChoice:
    tensorboard: bool = True
    """Write RUN/tensorboard beside RUN/metrics.jsonl."""
    tracker: str = "none"
    """Also to trackio or wandb (must be installed), or none."""
    project: str = "mobilellm"
    """Project name there."""


@dataclass(frozen=True, kw_only=True)
class Recipe(TrainSettings):
    """Model, data and logging on top of what the loop reads."""

    model: ModelChoice
    data: DataChoice
    sample: SampleChoice = field(default_factory=SampleChoice)
    log: LogChoice = field(default_factory=LogChoice)
    qat: QatChoice | None = None

    def _problems(self) -> list[str]:
        problems = super()._problems()
        if not self.data.train:
            problems.append("data.train is empty; name at least one folder of shards")
        if self.data.weights and len(self.data.weights) != len(self.data.train):
            problems.append(
                f"data.weights has {len(self.data.weights)} numbers, data.train {len(self.data.train)} names"
            )
        if not all(0 < weight < math.inf for weight in self.data.weights):
            problems.append(f"data.weights = {list(self.data.weights)} must all be above 0")
        for name, value, least in (
            ("data.held_out_tokens", self.data.held_out_tokens, 2),  # one alone predicts nothing
            ("sample.tokens", self.sample.tokens, 1),
        ):
            if value < least:
                problems.append(f"{name} = {value} must be at least {least}")
        if not self.sample.temperature >= 0:
            problems.append(f"sample.temperature = {self.sample.temperature} must be 0 or above")
        if self.qat is not None:
            problems += self.qat.problems(self.steps, self.compute.strategy)
        if self.log.tracker not in ("none", "trackio", "wandb"):
            problems.append(f"log.tracker = {self.log.tracker!r} must be none, trackio or wandb")
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


def with_tables(recipe: Recipe, names: Collection[str]) -> Recipe:
    """The recipe with the optional tables of these names, at their defaults where it has none."""
    hints = get_type_hints(Recipe)
    kinds: dict[str, Any] = {name: _without_none(hints[name]) for name in names if name in hints}
    missing = {name for name in kinds if is_dataclass(kinds[name]) and getattr(recipe, name) is None}
    return replace(recipe, **{name: kinds[name]() for name in missing})


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
        if is_dataclass(value):
            inner = [
                f"{leaf.name} = {_toml(getattr(value, leaf.name))}"
                for leaf in fields(value)
                if getattr(value, leaf.name) is not None
            ]
            tables += ["", f"[{each.name}]", *inner]
        elif value is not None:
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
        elif is_dataclass(inner := _without_none(hints[name])):
            if isinstance(values[name], Mapping):
                arguments[name] = _build(inner, values[name], f"{prefix}{name}.", problems)
            else:
                problems.append(f"{prefix}{name} = {values[name]!r} must be a table")
        else:
            try:
                arguments[name] = _converted(hints[name], values[name])
            except TypeError as error:
                problems.append(f"{prefix}{name} = {values[name]!r} must be {error}")
    return lambda: kind(**{name: value() if callable(value) else value for name, value in arguments.items()})


def _converted(kind: Any, value: Any) -> Any:
    """A TOML value as the field's type. Raises TypeError whose text names the type."""
    if get_origin(kind) is tuple:
        if not isinstance(value, list):
            raise TypeError("a list")
        return tuple(_converted(get_args(kind)[0], item) for item in value)
    wanted = _without_none(kind)
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise TypeError("a path" if wanted is Path else f"of type {wanted.__name__}")
    return value


def _without_none(kind: Any) -> Any:
    """T of `T | None`; any other type as it is."""
    possible = get_args(kind)
    return next(each for each in possible if each is not type(None)) if type(None) in possible else kind


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
