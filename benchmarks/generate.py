"""Tokens/s and import-to-first-token of our PyTorch generation against transformers', on the same weights.

    python benchmarks/generate.py --preset 125m --json docs/results/generate.json

Random weights of the preset's shape, saved once as a plain Llama directory both load. Decoding is greedy,
of the same number of tokens after the same prompt, interleaved in one process; medians of the runs are
compared. The cold start is a new process each time: import, load, first token printed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
import torch

PROMPT = "The quick brown fox jumps over the lazy dog. " * 3

OURS_COLD = """
import sys
from mobilellm import generate
print(generate(sys.argv[1], "The quick brown fox", max_new_tokens=1)[0].tokens)
"""
THEIRS_COLD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs = tokenizer("The quick brown fox", return_tensors="pt")
print(model.generate(**inputs, max_new_tokens=1, do_sample=False)[0, -1:].tolist())
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="125m")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, Any] = {"preset": arguments.preset, "threads": arguments.threads}
        for dtype in arguments.dtypes:
            directory = _write_model(Path(folder) / dtype, arguments.preset, dtype)
            results[dtype] = {
                "decode": _decode(directory, arguments.tokens, arguments.runs),
                "cold_start": _cold_start(directory, arguments.runs),
            }
    machine.write(arguments.json, results)


def _write_model(directory: Path, preset: str, dtype: str) -> Path:
    from mobilellm.data.documents import python_documentation
    from mobilellm.model import checkpoint
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.presets import preset as config_of
    from mobilellm.tokenizer import Tokenizer

    torch.manual_seed(0)
    model = MobileLLM(config_of(preset)).to(checkpoint.torch_dtype(dtype))
    text = [document.text for document, _ in zip(python_documentation(), range(70), strict=False)]
    checkpoint.save(directory, model, Tokenizer.train(text, 2048), "llama")
    return directory


def _decode(directory: Path, tokens: int, runs: int) -> dict[str, Any]:
    """Tokens/s after the prompt, prompt included in the time, as a person would see it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import mobilellm
    from mobilellm.model.generate import generate_tokens

    ours = mobilellm.load(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    theirs = AutoModelForCausalLM.from_pretrained(directory)
    inputs = tokenizer(PROMPT, return_tensors="pt")

    prompt = inputs["input_ids"][0].tolist()

    def run_ours() -> list[int]:
        return [
            new.token for new in generate_tokens(ours.model, [prompt], max_new_tokens=tokens, stop_ids=())
        ]

    def run_theirs() -> list[int]:
        with torch.inference_mode():
            out = theirs.generate(**inputs, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
        return out[0, inputs["input_ids"].shape[1] :].tolist()

    same = _agreement(run_ours(), run_theirs())
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(runs):
        for name, function in (("ours", run_ours), ("transformers", run_theirs)):
            started = time.perf_counter()
            count = len(function())
            assert count == tokens, f"{name} stopped after {count} tokens"
            seconds[name].append(time.perf_counter() - started)
    return _compare(seconds, per=tokens) | {"first_equal_tokens": same}


def _cold_start(directory: Path, runs: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {"ours": [], "transformers": []}
    for _ in range(runs):
        for name, script in (("ours", OURS_COLD), ("transformers", THEIRS_COLD)):
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "-c", script, str(directory)], check=True, capture_output=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"},
            )  # fmt: skip
            seconds[name].append(time.perf_counter() - started)
    return _compare(seconds)


def _agreement(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def _compare(seconds: dict[str, list[float]], per: int | None = None) -> dict[str, Any]:
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "transformers"))
    out: dict[str, Any] = {"seconds": {"ours": round(ours, 3), "transformers": round(theirs, 3)}}
    if per is None:
        return out | {"ratio_of_time": round(ours / theirs, 3)}
    out["tokens_per_second"] = {"ours": round(per / ours, 1), "transformers": round(per / theirs, 1)}
    return out | {"ratio_of_speed": round(theirs / ours, 2)}


if __name__ == "__main__":
    main()
