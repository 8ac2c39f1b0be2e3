"""Run folders as the training loop leaves them, with losses that are known."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

TOKENS_A_STEP = 1_000
FACTS = {
    "name": "a run",
    "config": {},
    "parameters": 1_234_567,
    "flops_per_token": 8_000_000,
    "flops_per_token_6n": 6_000_000,
    "peak_flops": 1e12,
    "device": "NVIDIA H100 80GB HBM3",
    "world_size": 2,
    "tokens_per_step": TOKENS_A_STEP,
    "steps": 200,
    "versions": {"torch": "2.13.0"},
    "started": "2026-11-20T10:00:00",
}
RECIPE = 'steps = 200\nseed = 0\n[optim]\nname = "adamw"\nlr = 0.002\n[data]\ntrain = ["shards"]\n'


def step_record(step: int, **changes: Any) -> dict[str, Any]:
    """Loss 8/sqrt(step); 0.1 s a step, so 10,000 tokens/s, of which 0.002 s waiting; the first takes 5 s."""
    return {
        "step": step,
        "tokens": step * TOKENS_A_STEP,
        "loss": 8 / math.sqrt(step),
        "learning_rate": 0.002,
        "gradient_norm": 1.0,
        "seconds": 5.0 if step == 1 else 0.1,
        "data_seconds": 0.002,
        "peak_memory_bytes": 5_000_000_000 + step,
    } | changes


def evaluation(step: int, loss: float, **more: float) -> dict[str, Any]:
    numbers = {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": loss / 3}
    return {"step": step, "eval": numbers | more}


def records(steps: int = 100) -> list[dict[str, Any]]:
    """Held-out loss is best at step 50."""
    return [
        evaluation(0, 9.0),
        *(step_record(step) for step in range(1, steps // 2 + 1)),
        evaluation(steps // 2, 2.0),
        {"step": steps // 2, "samples": [["Once", " half-way"]]},
        *(step_record(step) for step in range(steps // 2 + 1, steps + 1)),
        evaluation(steps, 2.5),
        {"step": steps, "samples": [["Once", " at the end"], ["The", " end <b>&"]]},
    ]


def write_run(
    folder: Path,
    lines: list[dict[str, Any]] | None = None,
    facts: dict[str, Any] | None = FACTS,
    recipe: str | None = RECIPE,
    tail: str = "",
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in (records() if lines is None else lines)) + tail
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    if facts is not None:
        (folder / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    if recipe is not None:
        (folder / "recipe.toml").write_text(recipe, encoding="utf-8")
    return folder
