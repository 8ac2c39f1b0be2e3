"""Zero-shot accuracy of one model on the tasks of the published tables, as a record.

lm-eval builds the prompts, judges the answers and takes the means; the model answers; the `paper` column is
computed here from the same answers (mobilellm.eval.paper).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import math
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mobilellm.atomic import atomic_write
from mobilellm.eval.interface import LanguageModel
from mobilellm.eval.paper import UNCONDITIONAL, chosen
from mobilellm.eval.record import Record, record
from mobilellm.eval.tasks import BY_NAME, LoadedTasks, quiet

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from mobilellm.eval.harness import HarnessModel, Pair, Progress

Sample = dict[str, Any]
"""What lm-eval logs of a document: arguments, answers, target, metrics."""

PROTOCOL = "lm-eval zero-shot"
_PAPER_NOTE = (
    "paper: a reconstruction of the scoring behind the published tables: likelihood per character; BoolQ and "
    f"OBQA by P(answer | question) / P(answer | {UNCONDITIONAL!r})"
)
_AVERAGE_NOTE = "average of acc_norm: takes acc for BoolQ, SIQA and WinoGrande, where lm-eval has no acc_norm"


class ZeroShot(NamedTuple):
    """A record, and every answer it was computed from."""

    record: Record
    samples: dict[str, list[Sample]]
    unconditional: dict[Pair, float]
    """Log-likelihoods of answers without their question."""


def score(
    model: LanguageModel,
    loaded: LoadedTasks,
    limit: int | None = None,
    seed: int = 1234,
    progress: Callable[[Progress], None] | None = None,
) -> ZeroShot:
    """Score a model on loaded tasks, the first `limit` documents of each.

    `seed` draws the examples for tasks that show some; the eight show none. Nothing is printed.
    """
    from mobilellm.eval.harness import HarnessModel

    check_limit(limit)
    already = getattr(model, "cached", 0)
    with quiet():
        besides = _unconditional_pairs(loaded.tasks, limit)
    harness = HarnessModel(model, besides, progress)
    evaluation = _evaluate(harness, loaded.tasks, limit, seed)
    samples: dict[str, list[Sample]] = evaluation["samples"]
    results: dict[str, dict[str, Any]] = {}
    items: dict[str, dict[str, list[float]]] = {}
    for name, task in loaded.tasks.items():
        metrics, items[name] = _metrics(evaluation["results"][name]), _by_document(samples[name])
        if name in BY_NAME:
            items[name]["paper"] = _paper_scores(name, task, samples[name], harness.answers_besides)
            metrics |= _paper_metrics(name, items[name]["paper"])
        results[name] = {
            "documents": len({sample["doc_id"] for sample in samples[name]}),
            "documents_sha256": _documents_sha256(samples[name]),
            "version": evaluation["versions"][name],
            "num_fewshot": evaluation["n-shot"][name] or 0,
            **metrics,
        }
    if all(name in results for name in BY_NAME):
        results["average"] = _average(results)
    cached = getattr(model, "cached", 0) - already
    made = record(
        kind="zero-shot",
        model=model.identity,
        protocol=_protocol(loaded, limit, seed, "average" in results, harness.truncated),
        results=results,
        items=items,
        seconds=harness.seconds,
        scored=harness.requests - cached,
        cached=cached,
    )
    return ZeroShot(made, samples, harness.answers_besides)


def check_limit(limit: int | None) -> None:
    """ValueError for a number of documents that makes no sense."""
    if limit is not None and limit < 1:
        raise ValueError(f"limit = {limit} must be at least 1")


def save_log_likelihoods(scored: ZeroShot, path: str | Path) -> None:
    """Write every scored answer as a line of gzipped JSON: task, document, choice, texts, log-likelihood.

    Where the paper column needed it, `unconditional` is the log-likelihood without the question. The file
    appears whole or not at all, and equal answers make equal bytes.
    """
    with (
        atomic_write(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, filename="", mode="wb", mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as lines,
    ):
        for name, samples in scored.samples.items():
            for sample in samples:
                for choice, (pair, answers) in enumerate(
                    zip(sample["arguments"], sample["resps"], strict=True)
                ):
                    if not isinstance(answers[0], tuple):
                        continue  # generated text, or a whole text's likelihood
                    context, continuation = pair
                    line = {
                        "task": name,
                        "document": sample["doc_id"],
                        "choice": choice,
                        "context": context,
                        "continuation": continuation,
                        "log_likelihood": answers[0][0],
                        "is_greedy": answers[0][1],
                    }
                    if name in BY_NAME and (UNCONDITIONAL, continuation) in scored.unconditional:
                        line["unconditional"] = scored.unconditional[UNCONDITIONAL, continuation]
                    lines.write(json.dumps(line, ensure_ascii=False) + "\n")


def _evaluate(harness: HarnessModel, tasks: dict[str, Task], limit: int | None, seed: int) -> dict[str, Any]:
    """lm-eval's results, which hold every sample."""
    from lm_eval.evaluator import evaluate

    with quiet():
        for task in tasks.values():
            task.set_fewshot_seed(seed)
        evaluation: dict[str, Any] = evaluate(harness, {"tasks": dict(tasks)}, limit=limit)
    return evaluation


def _unconditional_pairs(tasks: dict[str, Task], limit: int | None) -> list[Pair]:
    """The answers of the tasks that are scored against them, each once, in front of them no question."""
    pairs: dict[Pair, None] = {}
    for name, task in tasks.items():
        if name in BY_NAME and BY_NAME[name].paper == "against the unconditional answer":
            for _, document in task.doc_iterator(limit=limit):
                for choice in task.doc_to_choice(document):
                    pairs[UNCONDITIONAL, f"{task.config.target_delimiter}{choice}"] = None
    return list(pairs)


def _metrics(results: dict[str, Any]) -> dict[str, float | None]:
    """lm-eval's numbers of a task by plain names ("acc", "acc_stderr"); None where it has no such number."""
    return {
        key.removesuffix(",none"): None if value == "N/A" else float(value)
        for key, value in results.items()
        if "," in key
    }


def _by_document(samples: Sequence[Sample]) -> dict[str, list[float]]:
    """Metric -> its value for each document, where that is a number."""
    values: dict[str, list[float]] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            if isinstance(sample[metric], int | float):
                name = metric if sample["filter"] == "none" else f"{metric},{sample['filter']}"
                values.setdefault(name, []).append(float(sample[metric]))
    return values


def _paper_scores(
    name: str, task: Task, samples: Sequence[Sample], unconditional: dict[Pair, float]
) -> list[float]:
    """1 for every document whose right answer is chosen, else 0."""
    scores = []
    for sample in samples:
        continuations = [continuation for _, continuation in sample["arguments"]]
        answer = chosen(
            BY_NAME[name].paper,
            [answers[0][0] for answers in sample["resps"]],
            continuations,
            [unconditional.get((UNCONDITIONAL, continuation), 0.0) for continuation in continuations],
            task.config.target_delimiter,
        )
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        scores.append(float(answer == gold))
    return scores


def _paper_metrics(name: str, scores: Sequence[float]) -> dict[str, Any]:
    from lm_eval.api.metrics import mean, mean_stderr

    return {
        "paper": mean(scores),
        "paper_stderr": mean_stderr(scores) if len(scores) > 1 else None,
        "paper_scoring": BY_NAME[name].paper,
    }


def _average(results: dict[str, dict[str, Any]]) -> dict[str, float | None]:
    """Means over the eight, each task counting alike, and the standard errors of these means."""
    average: dict[str, float | None] = {}
    for metric in ("acc", "acc_norm", "paper"):
        used = [
            (result, metric if metric in result else "acc") for result in map(results.get, BY_NAME) if result
        ]
        errors = [result[f"{name}_stderr"] for result, name in used]
        average[metric] = sum(result[name] for result, name in used) / len(used)
        average[f"{metric}_stderr"] = (
            None if None in errors else math.sqrt(sum(error**2 for error in errors)) / len(used)
        )
    return average


def _documents_sha256(samples: Sequence[Sample]) -> str:
    """Of what was asked, in order: two records with the same one can be compared document by document."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample["arguments"], sample["target"]], default=str).encode())
    return digest.hexdigest()


def _protocol(
    loaded: LoadedTasks, limit: int | None, seed: int, whole: bool, truncated: int
) -> dict[str, Any]:
    files = {
        name: {"file": "/".join(file.path.parts[-2:]), "sha256": file.sha256}
        for name, file in loaded.files.items()
    }
    notes = [_PAPER_NOTE] if any(name in BY_NAME for name in loaded.tasks) else []
    notes += [_AVERAGE_NOTE] if whole else []
    notes += loaded.notes
    if limit is not None:
        notes.append(f"only the first {limit:,} documents of each task")
    if truncated:
        notes.append(f"{truncated:,} requests were longer than the model's context and lost their beginning")
    return {
        "name": PROTOCOL,
        "lm_eval": version("lm_eval"),
        "num_fewshot": 0,
        "data": files or "lm-eval's sources",
        "limit": limit,
        "seed": seed,
        "notes": notes,
    }
