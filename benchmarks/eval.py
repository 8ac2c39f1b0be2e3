"""Speed and peak memory of evaluation, ours against lm-eval's own backend and a plain transformers loop.

    python benchmarks/eval.py --json docs/results/eval.json

Zero-shot: requests/s over the first documents of each of the eight tasks, in proportion to their number, as
lm-eval makes them; the rival is its Hugging Face backend, at the best of several batch sizes, on stock
LlamaForCausalLM. Perplexity: windows of real text, each in one forward pass of transformers with labels.
Random weights of the preset's shape, the same for both. Encoding counts, loading does not. Every run is a
process of its own, the contestants take turns; peak memory is what that process held at most, loading too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine  # nothing heavy here: the work is done in children

OURS, ZERO_SHOT_RIVAL, PERPLEXITY_RIVAL = "ours", "lm-eval", "transformers"
WARM_UP = 8
"""Requests answered before the clock starts."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), help="zeroshot, wikitext2, tokenizer"
    )
    parser.add_argument("--preset", default="125m")
    parser.add_argument("--documents", type=int, default=32, help="of all tasks together")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batches", nargs="+", type=int, default=[4, 8, 16], help="batch sizes of lm-eval")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--quick", action="store_true", help="a few requests, once: whether it all runs")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_work(*arguments.worker)))
        return
    if arguments.quick:
        arguments.documents, arguments.windows, arguments.runs, arguments.batches = 4, 1, 1, [8]
    with tempfile.TemporaryDirectory() as folder:
        machine.write(arguments.json, _results(arguments, Path(folder)))


def _results(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    settings = {
        name: getattr(arguments, name) for name in ("preset", "threads", "runs", "documents", "windows")
    }
    _spawn(arguments, "prepare", folder, arguments.data, arguments.documents, arguments.windows)
    results: dict[str, Any] = dict(settings)
    for dtype in arguments.dtypes:
        directory = folder / dtype
        _spawn(arguments, "model", directory, arguments.data, arguments.preset, dtype)
        results[dtype] = {
            "zero_shot": _compare(arguments, "zero_shot", ZERO_SHOT_RIVAL, directory, arguments.batches),
            "perplexity": _compare(arguments, "perplexity", PERPLEXITY_RIVAL, directory, [1]),
        }
    return results


def _compare(
    arguments: argparse.Namespace, kind: str, rival: str, directory: Path, batches: list[int]
) -> dict[str, Any]:
    """The rival's batch sizes are all tried in the first round; the later ones are run at the best."""
    ours: list[dict[str, Any]] = []
    theirs: dict[int, list[dict[str, Any]]] = {batch: [] for batch in batches}
    for _ in range(arguments.runs):
        ours.append(_spawn(arguments, kind, OURS, directory, 0))
        for batch in batches:
            theirs[batch].append(_spawn(arguments, kind, rival, directory, batch))
        batches = [max(theirs, key=lambda size: _median(theirs[size], "per_second"))]
    best = batches[0]
    a, b = _summary(ours), _summary(theirs[best])
    differences = [abs(x - y) for x, y in zip(ours[0]["totals"], theirs[best][0]["totals"], strict=True)]
    return {
        "unit": ours[0]["unit"],
        "count": len(differences),
        OURS: a,
        rival: b | {"batch": best},
        "per_second_by_batch": {size: round(_median(runs, "per_second"), 2) for size, runs in theirs.items()},
        "ratio_of_speed": round(a["per_second"] / b["per_second"], 2),
        "ratio_of_processor_time": round(a["processor_seconds"] / b["processor_seconds"], 3),
        "ratio_of_peak_memory": round(a["peak_megabytes"] / b["peak_megabytes"], 2),
        "largest_difference_in_nats": float(f"{max(differences):.2g}"),
    }


def _summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "per_second": round(_median(runs, "per_second"), 3),
        "all_runs": [round(run["per_second"], 3) for run in runs],
        "processor_seconds": round(_median(runs, "processor_seconds"), 2),
        "peak_megabytes": round(_median(runs, "peak_megabytes")),
    }


def _median(runs: list[dict[str, Any]], name: str) -> float:
    return statistics.median(run[name] for run in runs)


def _spawn(arguments: argparse.Namespace, *work: Any) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", *map(str, work)]
    result = machine.child(command, OMP_NUM_THREADS=str(arguments.threads))
    if "per_second" in result:
        print(f"{' '.join(map(str, work))}: {result['per_second']:.2f} {result['unit']}", file=sys.stderr)
    return result


# In the child


def _work(kind: str, *arguments: str) -> dict[str, Any]:
    if kind == "prepare":
        return _prepare(*arguments)
    if kind == "model":
        return _write_model(*arguments)
    contestant, directory, batch = arguments[0], Path(arguments[1]), int(arguments[2])
    function = _zero_shot if kind == "zero_shot" else _perplexity
    return function(contestant, directory, batch) | {"peak_megabytes": _peak()}


def _peak() -> float:
    """The most memory this process itself has held; what it was forked from does not count."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _prepare(folder: str, data: str, documents: str, windows: str) -> dict[str, Any]:
    """The pairs that lm-eval asks about the first documents of each task, and windows of 2,048 tokens."""
    from mobilellm.eval.tasks import load_tasks, quiet

    tasks = load_tasks(data_dir=Path(data) / "zeroshot").tasks
    sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
    pairs: list[list[str]] = []
    for name, task in tasks.items():
        with quiet():
            task.build_all_requests(limit=max(1, round(int(documents) * sizes[name] / sum(sizes.values()))))
        pairs += [list(instance.args) for instance in task.instances]
    Path(folder, "pairs.json").write_text(json.dumps(pairs), encoding="utf-8")
    text = Path(data, "wikitext2", "wiki.test.raw").read_text(encoding="utf-8")
    ids = _tokenizer(data).encode(text[: 20_000 * int(windows)])  # some 4 characters a token
    rows = [ids[start : start + 2048] for start in range(0, 2048 * int(windows), 2048)]
    assert all(len(row) == 2048 for row in rows)
    Path(folder, "windows.json").write_text(json.dumps(rows), encoding="utf-8")
    return {}


def _tokenizer(data: str) -> Any:
    from mobilellm.tokenizer import Tokenizer

    return Tokenizer.load(Path(data, "tokenizer", "llama_sp_32k.tokenizer.model"))


def _write_model(directory: str, data: str, preset: str, dtype: str) -> dict[str, Any]:
    from dataclasses import replace

    import torch

    from mobilellm.model import checkpoint
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.presets import preset as config_of

    tokenizer = _tokenizer(data)
    config = replace(config_of(preset), vocab_size=tokenizer.vocab_size, max_position_embeddings=2048)
    model = MobileLLM(config, torch.Generator().manual_seed(0)).to(checkpoint.torch_dtype(dtype))
    checkpoint.save(directory, model, tokenizer, "llama")
    return {}


def _zero_shot(contestant: str, directory: Path, batch: int) -> dict[str, Any]:
    from lm_eval.api.instance import Instance

    pairs = json.loads((directory.parent / "pairs.json").read_text(encoding="utf-8"))
    requests = [Instance("loglikelihood", {}, tuple(pair), number) for number, pair in enumerate(pairs)]
    if contestant == OURS:
        from mobilellm.eval.harness import HarnessModel

        model: Any = HarnessModel(_our_model(directory))
    else:
        from lm_eval.models.huggingface import HFLM

        model = HFLM(
            pretrained=str(directory), device="cpu", dtype=directory.name, batch_size=batch, max_length=2048
        )
    model.loglikelihood(requests[:WARM_UP])
    started, processor = time.perf_counter(), time.process_time()
    answers = model.loglikelihood(requests)
    return _timed(started, processor, [total for total, _ in answers], "requests/s")


def _perplexity(contestant: str, directory: Path, batch: int) -> dict[str, Any]:
    """Summed log-likelihood of all but the first token of each window."""
    import torch

    windows = json.loads((directory.parent / "windows.json").read_text(encoding="utf-8"))
    totals: list[float] = []
    if contestant == OURS:
        from mobilellm.eval.interface import Request

        model: Any = _our_model(directory)
        requests = [Request((row[0],), tuple(row[1:])) for row in windows]
        list(model.log_likelihoods([Request((1,), (2, 3))]))
        started, processor = time.perf_counter(), time.process_time()
        answers = dict(model.log_likelihoods(requests))
        totals = [answers[number].total for number in range(len(requests))]
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(directory, dtype=directory.name)
        with torch.inference_mode():
            model(torch.tensor([[1, 2, 3]]))
            started, processor = time.perf_counter(), time.process_time()
            for row in windows:
                ids = torch.tensor([row])
                totals.append(-model(ids, labels=ids).loss.item() * (len(row) - 1))
    return _timed(started, processor, totals, "windows/s")


def _our_model(directory: Path) -> Any:
    from mobilellm.eval.torch_model import torch_model
    from mobilellm.model.api import load

    return torch_model(load(directory))


def _timed(started: float, processor: float, totals: list[float], unit: str) -> dict[str, Any]:
    seconds = time.perf_counter() - started
    return {
        "unit": unit,
        "per_second": len(totals) / seconds,
        "processor_seconds": time.process_time() - processor,
        "totals": totals,
    }


if __name__ == "__main__":
    main()
