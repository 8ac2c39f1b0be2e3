"""Evaluation records with made-up answers, of the form the scoring writes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mobilellm.eval.interface import ModelIdentity
from mobilellm.eval.published import TASKS
from mobilellm.eval.record import Record

WITHOUT_NORM = ("boolq", "social_iqa", "winogrande")
ENVIRONMENT = {
    "date": "2026-01-02", "commit": "abc1234", "cpu": "Some CPU (avx2)", "cores": 2, "system": "Linux x86_64",
    "python": "3.12.0", "packages": {"mobilellm": "0.1", "torch": "2.11"},
}  # fmt: skip


def identity(
    name: str = "model-a", parameters: int = 124_635_456, bytes_: int | None = None
) -> ModelIdentity:
    size = 2 * parameters if bytes_ is None else bytes_
    return ModelIdentity(
        name, "mobilellm", "bfloat16", "cpu", "f" * 64, parameters, size, {"hidden_size": 576}
    )


def zero_shot(
    answers: Mapping[str, Sequence[float]],
    model: ModelIdentity | None = None,
    norm: Mapping[str, Sequence[float]] | None = None,
    paper: Mapping[str, Sequence[float]] | None = None,
    limit: int | None = None,
) -> Record:
    """A record of right (1) and wrong (0) answers by task; acc_norm and paper are the same unless given."""
    results: dict[str, dict[str, Any]] = {}
    items: dict[str, dict[str, list[float]]] = {}
    for task, right in answers.items():
        metrics = {"acc": list(right), "paper": list((paper or answers)[task])}
        if task not in WITHOUT_NORM:
            metrics["acc_norm"] = list((norm or answers)[task])
        items[task] = metrics
        results[task] = {"documents": len(right), "version": 1.0, "paper_scoring": "bytes"}
        for metric, values in metrics.items():
            results[task] |= {metric: float(np.mean(values)), f"{metric}_stderr": 0.01}
        results[task]["documents_sha256"] = hashlib.sha256(f"{task} {len(right)}".encode()).hexdigest()
    if set(answers) == set(TASKS):
        results["average"] = {
            metric: float(np.mean([results[task].get(metric, results[task]["acc"]) for task in TASKS]))
            for metric in ("acc", "acc_norm", "paper")
        }
    protocol = {"name": "lm-eval zero-shot", "data": "lm-eval's sources", "limit": limit}
    return Record("zero-shot", model or identity(), protocol, results, items, ENVIRONMENT, 12.5, 100, 3)


def all_eight(
    accuracy: float, documents: int = 200, seed: int = 0, model: ModelIdentity | None = None, **more: Any
) -> Record:
    """Random answers to all eight tasks, a share `accuracy` of them right."""
    generator = np.random.default_rng(seed)
    answers = {task: (generator.random(documents) < accuracy).astype(float).tolist() for task in TASKS}
    return zero_shot(answers, model, **more)


def tools(asked_of: str = "talks.json", model: ModelIdentity | None = None, lone: bool = False) -> Record:
    """Questions of one category and a file of conversations; `lone`: of one conversation."""
    found: dict[str, Any] = {"call_turns": 4, "text_turns": 6}
    for metric, value in (("intent", 0.5), ("structure", 0.25), ("call", 0.25), ("rouge1", 0.125)):
        found |= {metric: value} if lone else {metric: value, f"{metric}_low": 0.1, f"{metric}_high": 0.9}
    results = {
        "simple": {"questions": 1200, "accuracy": 0.0, "accuracy_low": 0.0, "accuracy_high": 0.003},
        asked_of: found,
    }
    protocol = {"name": "tool calling, greedy", "max_tokens": 256}
    return Record("tools", model or identity(), protocol, results, {}, ENVIRONMENT, 9.0, 10, 0)


def chat(source: str = "talks.json", model: ModelIdentity | None = None, answered: int = 8) -> Record:
    result: dict[str, Any] = {
        "conversations": 1200, "tokens": 34_000, "loss": 2.0, "loss_low": 1.9, "loss_high": 2.125,
        "perplexity": math.exp(2), "bits_per_byte": 0.75, "answered": answered,
    }  # fmt: skip
    if answered:
        result |= {"stop_rate": 0.5, "stop_rate_low": 0.25, "stop_rate_high": 0.75, "length": 12.5}
        result["repetition"] = 0.125
    protocol = {"name": "chat", "max_tokens": 256}
    return Record("chat", model or identity(), protocol, {source: result}, {}, ENVIRONMENT, 9.0, 10, 0)


def perplexity(
    nats: Sequence[float],
    model: ModelIdentity | None = None,
    name: str = "wikitext2",
    protocol: str = "reference",
    tokens: int = 2047,
    bytes_: int = 8000,
    text_sha256: str = "a" * 64,
) -> Record:
    """A record of windows with these nats, all of as many tokens, bytes and (a fifth of the bytes) words."""
    windows, words = len(nats), bytes_ // 5
    total = math.fsum(nats)
    result = {
        "protocol": protocol, "nats": total, "tokens": tokens * windows, "words": words * windows,
        "bytes": bytes_ * windows, "token_perplexity": math.exp(total / (tokens * windows)),
        "word_perplexity": math.exp(total / (words * windows)),
        "bits_per_byte": total / math.log(2) / (bytes_ * windows), "units": windows,
        "text_sha256": text_sha256,
    }  # fmt: skip
    items = {
        "nats": list(nats), "tokens": [tokens] * windows, "words": [words] * windows, "bytes": [bytes_] * windows
    }  # fmt: skip
    settings: dict[str, Any] = {"name": protocol, "window": 2048}
    return Record("perplexity", model or identity(), settings, {name: result}, {name: items}, ENVIRONMENT, 9.0, 10, 0)  # fmt: skip
