"""What a run folder tells: its records as arrays, what it was run with, and the numbers it comes to."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.report.starts import Start, read_starts
from mobilellm.train.metrics import stream_metrics

Numbers = NDArray[np.float64]

_COLUMNS = ("step", "tokens", "loss", "learning_rate", "gradient_norm", "seconds", "data_seconds")
_LAST_STEPS = 50
_FACTS = {
    "name": str, "parameters": int, "flops_per_token": int, "flops_per_token_6n": int, "peak_flops": float,
    "device": str, "world_size": int, "steps": int, "versions": dict, "started": str, "starts": list,
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    step: int
    numbers: dict[str, float]


@dataclass(frozen=True)
class Samples:
    """What the model said at a step: prompt and completion."""

    step: int
    texts: list[tuple[str, str]]


@dataclass(frozen=True)
class History:
    """The records of one run. Each column has one number a step; what was not recorded is NaN."""

    directory: Path
    columns: dict[str, Numbers]
    peak_memory_bytes: int | None
    evaluations: list[Evaluation]
    samples: list[Samples]
    facts: dict[str, Any]
    """Of run.json: those of `_FACTS` that are known there."""
    recipe: dict[str, Any]
    """Of recipe.toml: value by dotted name."""

    @property
    def name(self) -> str:
        return str(self.facts.get("name") or self.directory.resolve().name)

    @cached_property
    def tokens_a_step(self) -> Numbers:
        """Tokens of each step. The first record of a run whose start is lost is taken for an average one."""
        tokens, step = self.columns["tokens"], self.columns["step"]
        if not len(tokens):
            return tokens
        return np.diff(tokens, prepend=tokens[0] - tokens[0] / max(1.0, step[0]))

    @cached_property
    def starts(self) -> list[Start]:
        """Every start of the run, in order."""
        return read_starts(self.facts)

    @cached_property
    def start_of_step(self) -> NDArray[np.intp]:
        """For each step the number of the start that recorded it: the last one from before it."""
        steps, number = self.columns["step"], np.zeros(len(self.columns["step"]), dtype=np.intp)
        for each, start in enumerate(self.starts):
            number[steps > start.step] = each
        return number

    def peak_rate(self, flops: str = "flops_per_token") -> Numbers:
        """Tokens/s at each step's hardware's peak; NaN where the peak is unknown. A share of it is the MFU.

        A token counts 6N and causal attention, or by "flops_per_token_6n" without attention.
        """
        per_token = self.facts.get(flops) or math.nan
        rates = [(start.peak_flops or math.nan) * start.world_size / per_token for start in self.starts]
        return np.array(rates)[self.start_of_step]

    def tokens_at(self, step: int) -> float | None:
        """Tokens seen after `step` steps; None for a step that is not in the records."""
        if step == 0:
            return 0.0
        index = int(np.searchsorted(self.columns["step"], step))
        found = index < len(self.columns["step"]) and self.columns["step"][index] == step
        return float(self.columns["tokens"][index]) if found else None


@dataclass(frozen=True)
class Summary:
    """What a run comes to. None where it is not recorded."""

    name: str
    directory: str
    steps: int
    planned_steps: int | None
    tokens: int
    parameters: int | None
    device: str | None
    world_size: int | None
    """Of the last start, as `device`."""
    hardware: list[str]
    """What the recorded steps were done on, in order, each change an entry."""
    train_loss: float | None
    """Mean of the last 50 steps, nats per token."""
    held_out_last: dict[str, float] | None
    """The last evaluation that has a loss, with its step."""
    held_out_best: dict[str, float] | None
    tokens_per_second: float | None
    """Median over the steps, all devices together."""
    mfu: float | None
    """Median over the steps whose hardware's peak is known, counting 6N and causal attention."""
    mfu_6n: float | None
    data_wait_share: float | None
    """Of the steps' time, the part spent waiting for data."""
    peak_memory_bytes: int | None
    step_seconds: float | None
    """The steps' time; evaluations, checkpoints and pauses are not in it."""


def read_history(directory: Path) -> History:
    """Read a run folder, also of a run that goes on or was cut off. Needs memory for its columns only.

    Raises FileNotFoundError for a folder that is no run, ValueError for damaged files.
    """
    file = directory / "metrics.jsonl"
    if not file.is_file():
        what = "no metrics.jsonl there; it is no run folder" if directory.is_dir() else "no such folder"
        raise FileNotFoundError(f"{directory}: {what} (mobilellm train RECIPE --out FOLDER makes one)")
    columns = {name: array("d") for name in _COLUMNS}
    evaluations, samples, peak = list[Evaluation](), list[Samples](), 0
    appends = [(name, column.append) for name, column in columns.items()]
    empty = True
    for record in stream_metrics(file):
        empty = False
        if "loss" in record and "tokens" in record:
            for name, append in appends:
                value = record.get(name)
                append(value if type(value) is float else _number(value))
            peak = max(peak, int(record.get("peak_memory_bytes") or 0))
        if isinstance(record.get("eval"), dict):
            numbers = {name: _number(value) for name, value in record["eval"].items()}
            evaluations.append(Evaluation(record["step"], numbers))
        if isinstance(record.get("samples"), list):
            texts = [(str(prompt), str(text)) for prompt, text in record["samples"]]
            samples.append(Samples(record["step"], texts))
    if empty:
        raise ValueError(f"{file}: holds no record yet; report again when the run has done a step")
    return History(
        directory=directory,
        columns={name: np.frombuffer(column, dtype=np.float64) for name, column in columns.items()},
        peak_memory_bytes=peak or None,
        evaluations=evaluations,
        samples=samples,
        facts=_facts(directory / "run.json"),
        recipe=_recipe(directory / "recipe.toml"),
    )


def summarise(history: History) -> Summary:
    columns, facts = history.columns, history.facts
    seconds = columns["seconds"]
    timed = seconds > 0
    rates = history.tokens_a_step[timed] / seconds[timed]
    waited = timed & np.isfinite(columns["data_seconds"])
    judged = [each for each in history.evaluations if math.isfinite(each.numbers.get("loss", math.nan))]
    return Summary(
        name=history.name,
        directory=str(history.directory),
        steps=int(columns["step"][-1]) if len(seconds) else 0,
        planned_steps=facts.get("steps") or history.recipe.get("steps"),
        tokens=int(columns["tokens"][-1]) if len(seconds) else 0,
        parameters=facts.get("parameters"),
        device=facts.get("device"),
        world_size=facts.get("world_size"),
        hardware=_hardware(history),
        train_loss=float(np.mean(columns["loss"][-_LAST_STEPS:])) if len(seconds) else None,
        held_out_last=_flat(judged[-1]) if judged else None,
        held_out_best=_flat(min(judged, key=lambda each: each.numbers["loss"])) if judged else None,
        tokens_per_second=_median(rates),
        mfu=_median(rates / history.peak_rate()[timed]),
        mfu_6n=_median(rates / history.peak_rate("flops_per_token_6n")[timed]),
        data_wait_share=(
            float(columns["data_seconds"][waited].sum() / seconds[waited].sum()) if waited.any() else None
        ),
        peak_memory_bytes=history.peak_memory_bytes,
        step_seconds=float(seconds[timed].sum()) if timed.any() else None,
    )


def differences(histories: Sequence[History]) -> dict[str, list[Any]]:
    """Recipe fields that differ, by dotted name, a value a run (None where unset).

    Runs from before there were recipes have None everywhere, and make no difference.
    """
    names = dict.fromkeys(name for history in histories for name in history.recipe)
    known = [history.recipe for history in histories if history.recipe]
    return {
        name: [history.recipe.get(name) for history in histories]
        for name in names
        if any(recipe.get(name) != known[0].get(name) for recipe in known)
    }


def _flat(evaluation: Evaluation) -> dict[str, float]:
    return {"step": evaluation.step, **evaluation.numbers}


def _median(values: Numbers) -> float | None:
    """Of what is finite; None where nothing is."""
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else None


def _hardware(history: History) -> list[str]:
    numbers = np.unique(history.start_of_step) if len(history.start_of_step) else [-1]
    names = [history.starts[number].hardware for number in numbers]
    return [name for name, _ in itertools.groupby(name for name in names if name is not None)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _facts(file: Path) -> dict[str, Any]:
    """Of run.json what is of the right type; {} for a run from before there was one."""
    if not file.is_file():
        return {}
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{file}: not JSON ({error}); correct it, or move it away to report without"
        ) from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: not a JSON object; correct it, or move it away to report without")
    facts = {}
    for name, kind in _FACTS.items():
        value = values.get(name)
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is kind:
            facts[name] = value
    return facts


def _recipe(file: Path) -> dict[str, Any]:
    """recipe.toml by dotted names; fields of another version of this package are read too."""
    if not file.is_file():
        return {}
    try:
        return _dotted(tomllib.loads(file.read_text(encoding="utf-8")), "")
    except ValueError as error:
        raise ValueError(
            f"{file}: not TOML ({error}); correct it, or move it away to report without"
        ) from None


def _dotted(values: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            leaves |= _dotted(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves
