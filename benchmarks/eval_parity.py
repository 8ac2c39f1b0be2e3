"""Are our zero-shot answers those of lm-eval's own Hugging Face backend? Answer by answer, on real data.

    python benchmarks/eval_parity.py MODEL ../shared/data/zeroshot --json docs/results/eval-parity.json

Scores a model directory twice, by this package and by lm-eval's `HFLM` on the same tasks and documents, and
prints the largest difference of a log-likelihood, how many greedy flags differ, and whether accuracies and
standard errors are equal. MODEL 125m stands for random weights of that shape.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="model directory, or 125m for random weights")
    parser.add_argument("data", type=Path, help="folder with the tasks' data")
    parser.add_argument("--limit", type=int, help="documents of each task")
    parser.add_argument("--batch", type=int, default=16, help="lm-eval's batch size")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        directory = _random(Path(folder)) if arguments.model == "125m" else Path(arguments.model)
        machine.write(arguments.json, _compare(directory, arguments))


def _compare(directory: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    from mobilellm.eval.models import open_model
    from mobilellm.eval.tasks import load_tasks, quiet
    from mobilellm.eval.zero_shot import score

    loaded = load_tasks((), arguments.data)
    model = open_model(directory)
    began = time.perf_counter()
    ours = score(model, loaded, arguments.limit)
    between = time.perf_counter()
    rival = HFLM(
        pretrained=str(directory),
        device="cpu",
        dtype="float32",
        batch_size=arguments.batch,
        max_length=model.context,
    )
    with quiet():
        theirs = evaluate(rival, {"tasks": loaded.tasks}, limit=arguments.limit)
    ended = time.perf_counter()
    answers, worst, flags, equal = 0, 0.0, 0, True
    for name, samples in ours.samples.items():
        for one, other in zip(samples, theirs["samples"][name], strict=True):
            assert one["arguments"] == other["arguments"]
            for (mine,), (lm_evals,) in zip(one["resps"], other["resps"], strict=True):
                answers += 1
                worst = max(worst, abs(mine[0] - lm_evals[0]))
                flags += mine[1] != lm_evals[1]
        numbers = theirs["results"][name]
        equal &= all(
            ours.record.results[name][key.removesuffix(",none")] == value
            for key, value in numbers.items()
            if key.endswith(",none") and value != "N/A"
        )
    return {
        "model": arguments.model,
        "parameters": ours.record.model.parameters,
        "dtype": ours.record.model.dtype,
        "documents_of_each_task": arguments.limit or "all",
        "answers": answers,
        "largest_difference_in_nats": float(f"{worst:.2g}"),
        "greedy_flags_that_differ": flags,
        "accuracies_and_errors_equal": bool(equal),
        "accuracies": {
            name: {key: round(result[key], 4) for key in ("acc", "acc_norm", "paper") if key in result}
            for name, result in ours.record.results.items()
        },
        "seconds_ours": round(between - began, 1),
        "seconds_lm_eval": round(ended - between, 1),
    }


def _random(folder: Path) -> Path:
    """Random weights of the 125M shape, with a tokenizer trained on Python's own documentation."""
    from dataclasses import replace
    from pydoc_data.topics import topics

    import torch

    from mobilellm.model import checkpoint
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.presets import preset
    from mobilellm.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(topics.values(), 4096)
    config = replace(preset("125m"), initializer_range=0.1)  # logits far enough apart to compare flags
    checkpoint.save(folder / "125m", MobileLLM(config, torch.Generator().manual_seed(0)), tokenizer, "llama")
    return folder / "125m"


if __name__ == "__main__":
    main()
