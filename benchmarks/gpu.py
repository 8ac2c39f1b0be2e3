"""Tokens/s and MFU of pretraining on one GPU, ours (the real loop) against the Hugging Face Trainer.

    benchmarks/gpu.sh docs/results/gpu.json
    python benchmarks/gpu.py --device cpu --sizes test --sequences 4 --length 64   # a trial

A step is 32 sequences of 2,048 tokens, as one GPU of the official run had; micro-batches of several sizes
are tried, the best counts. bfloat16 products, fused AdamW, clipping at 1.0, random tokens. MFU counts 6N
and causal attention (accounting.training_flops_per_token) against the dense bf16 peak of the data sheet.
What does not fit in the budget of seconds is left out, and said.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine
from rival_llama import llama_of

SIZES = {  # micro-batches to try, the likeliest best first
    "125m": (32, 16),
    "350m": (16, 32),
    "600m": (16, 8),
    "1b": (8, 16),
    "1.5b": (8, 4),
}
WARM_UP, MEASURED = 3, 6


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--sequences", type=int, default=32, help="of one step")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything")
    parser.add_argument("--no-rival", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("SYSTEM", "SIZE", "MICRO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_work(arguments)))
        return
    deadline = time.monotonic() + arguments.budget
    results: dict[str, Any] = {"sequences": arguments.sequences, "length": arguments.length, "sizes": {}}
    # First a run of each system and size, then the other micro-batches: a short budget loses the least.
    runs = [(system, size, 0) for size in arguments.sizes for system in ("ours", "trainer")]
    runs += [("ours", size, 1) for size in arguments.sizes if len(_candidates(size, arguments)) > 1]
    for system, size, number in runs:
        if system == "trainer" and arguments.no_rival:
            continue
        micro = _candidates(size, arguments)[number]
        entry = results["sizes"].setdefault(size, {"ours": [], "trainer": []})
        left = deadline - time.monotonic()
        entry[system].append({"micro_batch": micro} | _spawn(system, size, micro, arguments, left))
        print(f"{size} {system} {entry[system][-1]}", file=sys.stderr, flush=True)
    for entry in results["sizes"].values():
        best = {
            system: max(
                (run["tokens_per_second"] for run in entry[system] if "tokens_per_second" in run), default=0
            )
            for system in ("ours", "trainer")
        }
        if all(best.values()):
            entry["ratio_of_speed"] = round(best["ours"] / best["trainer"], 2)
    machine.write(arguments.json, results)


def _candidates(size: str, arguments: argparse.Namespace) -> tuple[int, ...]:
    return tuple(min(micro, arguments.sequences) for micro in SIZES.get(size, (2,)))


def _spawn(system: str, size: str, micro: int, arguments: argparse.Namespace, left: float) -> dict[str, Any]:
    if left < 10:
        return {"left_out": "the budget of seconds was spent"}
    command = [
        sys.executable, __file__, "--worker", system, size, str(micro), "--device", arguments.device,
        "--sequences", str(arguments.sequences), "--length", str(arguments.length),
    ]  # fmt: skip
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=left, env=os.environ, check=False
        )
    except subprocess.TimeoutExpired:
        return {"left_out": "the budget of seconds was spent"}
    if done.returncode:
        return {
            "failed": done.stderr.strip().splitlines()[-1][:300] if done.stderr.strip() else "no reason given"
        }
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


# In the child


def _work(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch

    from mobilellm.accounting import training_flops_per_token
    from mobilellm.hardware import peak_flops
    from mobilellm.presets import preset

    system, size, micro = arguments.worker[0], arguments.worker[1], int(arguments.worker[2])
    started = time.perf_counter()
    config = preset(size)
    seconds = (_ours if system == "ours" else _trainer)(config, micro, arguments)
    cuda = arguments.device == "cuda"
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    rate = arguments.sequences * arguments.length / statistics.median(seconds[WARM_UP:])
    out = {
        "tokens_per_second": round(rate),
        "seconds_a_step": [round(each, 4) for each in seconds],
        "seconds_in_all": round(time.perf_counter() - started, 1),
    }
    if cuda:
        out["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    if peak:
        out["mfu"] = round(rate * training_flops_per_token(config, arguments.length) / peak, 3)
        out["mfu_6n"] = round(
            rate * training_flops_per_token(config, arguments.length, attention=False) / peak, 3
        )
    return out


def _ours(config: Any, micro: int, arguments: argparse.Namespace) -> list[float]:
    import numpy as np
    import torch

    from mobilellm.data.loader import PackedLoader
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.train.loop import train
    from mobilellm.train.settings import (
        BatchSettings,
        CheckpointSettings,
        ComputeSettings,
        ScheduleSettings,
        TrainSettings,
    )  # fmt: skip

    steps, length = WARM_UP + MEASURED, arguments.length
    settings = TrainSettings(
        steps=steps,
        batch=BatchSettings(
            tokens_per_step=arguments.sequences * length, sequence_length=length, micro_batch=micro
        ),
        schedule=ScheduleSettings(warmup_steps=0),
        compute=ComputeSettings(compile=arguments.device == "cuda"),
        checkpoint=CheckpointSettings(every=10 * steps),
    )
    model = MobileLLM(config, torch.Generator().manual_seed(0)).to(arguments.device)
    count = arguments.sequences * length * steps
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, count, dtype=np.uint16)
    records: list[dict[str, Any]] = []

    class Enough(Exception):  # noqa: N818
        """Raised after the last step, so that no checkpoint is written."""

    def on_record(record: dict[str, Any]) -> None:
        records.append(record)
        if len(records) == steps:
            raise Enough

    with tempfile.TemporaryDirectory() as folder:
        loader = PackedLoader(tokens, length, arguments.sequences, 0)
        with contextlib.suppress(Enough):
            train(model, loader, settings, Path(folder), on_record=on_record)
    return [record["seconds"] for record in records]


def _trainer(config: Any, micro: int, arguments: argparse.Namespace) -> list[float]:
    import numpy as np
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    steps, length = WARM_UP + MEASURED, arguments.length
    model = llama_of(config)
    marks: list[float] = []

    class Ticking(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            if arguments.device == "cuda":
                torch.cuda.synchronize()
            marks.append(time.perf_counter())

    shape = (arguments.sequences * steps, length)
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int64))
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=steps,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=max(1, arguments.sequences // micro),
                lr_scheduler_type="constant",
                optim="adamw_torch_fused",
                bf16=True,
                use_cpu=arguments.device == "cpu",
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[Ticking()],
        ).train()
    return [later - earlier for earlier, later in itertools.pairwise(marks)]


if __name__ == "__main__":
    main()
