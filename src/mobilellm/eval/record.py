"""One JSON file an evaluation: what was scored, how, with what result, on what machine.

kind          "perplexity", "zero-shot", "tools" or "chat"
model         ModelIdentity
protocol      name and settings, all that is needed to run it again
results       name of a task or text -> numbers by the name of the metric
items         name of a task or text -> metric -> one number a document or window, for paired comparison
environment   date, commit, machine, versions
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write
from mobilellm.environment import environment
from mobilellm.eval.interface import ModelIdentity

FORMAT = "mobilellm-evaluation-1"
KINDS = ("perplexity", "zero-shot", "tools", "chat")
FIGURES_OF_TOOLS = {
    "accuracy": "right",
    "intent": "exact match of intent",
    "structure": "exact match of structure",
    "call": "exact match of the whole call",
    "rouge1": "ROUGE-1 of responses",
    "rougeL": "ROUGE-L of responses",
}
"""What the metrics of a tools record are called. METRIC_low, METRIC_high: its interval, where it has one."""
PACKAGES = ("mobilellm", "torch", "transformers", "tokenizers", "numpy", "lm_eval", "datasets", "rouge_score")


@dataclass(frozen=True)
class Record:
    kind: str
    model: ModelIdentity
    protocol: dict[str, Any]
    results: dict[str, dict[str, Any]]
    items: dict[str, dict[str, list[float]]]
    environment: dict[str, Any]
    seconds: float
    """Wall time of the scoring; what came from the cache took none."""
    scored: int
    """Requests the model answered in this run."""
    cached: int
    """Requests answered from the cache."""


def record(
    kind: str,
    model: ModelIdentity,
    protocol: dict[str, Any],
    results: dict[str, dict[str, Any]],
    items: dict[str, dict[str, list[float]]],
    seconds: float,
    scored: int,
    cached: int,
) -> Record:
    """A record of here and now."""
    return Record(kind, model, protocol, results, items, environment(PACKAGES), seconds, scored, cached)


def to_json(record: Record) -> dict[str, Any]:
    return {"format": FORMAT, **asdict(record)}


def save(record: Record, path: str | Path) -> None:
    """Write a record; it appears whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(to_json(record), indent=1) + "\n", encoding="utf-8")


def read(path: str | Path) -> Record:
    """Read a record. Raises FileNotFoundError, or ValueError with one line that names the file and fault."""
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: is no evaluation record: {error}") from None
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(
            f'{path}: is no evaluation record (its "format" is not {FORMAT!r}); '
            "mobilellm eval ppl, zero-shot, tools and chat write them with --json"
        )
    names, wanted = set(content), {field.name for field in fields(Record)}
    if names != wanted:
        raise ValueError(f"{path}: fields missing or not known: {', '.join(sorted(names ^ wanted))}")
    if content["kind"] not in KINDS:
        raise ValueError(f"{path}: kind = {content['kind']!r} is not one of {', '.join(KINDS)}")
    try:
        model = ModelIdentity(**content["model"])
    except TypeError as error:
        raise ValueError(f"{path}: model: {error}") from None
    return Record(**{**content, "model": model})
