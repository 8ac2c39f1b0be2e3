"""Training speed and peak memory, ours against the Hugging Face Trainer, as a user would run each.

    python benchmarks/train.py --json docs/results/train.json

Same shape, random tokens, batch and optimiser (fused AdamW, betas 0.9 and 0.95, decay 0.1, clipping at 1.0),
weights float32, matrix products bfloat16. Every run is a fresh process; runs of the contestants alternate.
The rate counts the steps after the warm-up; compiling happens before and is reported apart. Peak memory is
the process's own, less that of a process which only imported the same packages.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Nothing heavy here: a child's peak memory includes its parent's at the fork.
import machine
from contest import in_turns, median, peak_bytes, ratios
from rival_llama import llama_of

SHAPES = {
    #        preset  sequences × tokens, steps before and in the measurement
    "tiny": ("tiny", 8, 256, 4, 20),
    "125m": ("125m", 1, 512, 2, 6),
    "125m-4": ("125m", 4, 512, 1, 3),
    "test": ("test", 2, 64, 1, 3),  # a trial of this script, not a measurement
}
RIVALRY = ("ours", "trainer", "trainer-compiled")
CONTESTANTS = (*RIVALRY, "ours-compiled")
LEARNING_RATE, BETAS, DECAY, CLIP = 2e-3, (0.9, 0.95), 0.1, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES)[:3], choices=list(SHAPES))
    parser.add_argument("--contestants", nargs="+", default=list(RIVALRY), choices=list(CONTESTANTS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("CONTESTANT", "SHAPE"), help=argparse.SUPPRESS)
    parser.add_argument("--import-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_work(*arguments.worker, arguments.import_only)))
        return
    results: dict[str, Any] = {"threads": arguments.threads, "runs": arguments.runs}
    with tempfile.TemporaryDirectory() as cache:
        for shape in arguments.shapes:
            results[shape] = _compare(shape, arguments.contestants, arguments.runs, arguments.threads, cache)
    machine.write(arguments.json, results)


def _compare(shape: str, contestants: list[str], runs: int, threads: int, cache: str) -> dict[str, Any]:
    def spawn(name: str, import_only: bool) -> dict[str, Any]:
        command = [sys.executable, __file__, "--worker", name, shape, *["--import-only"] * import_only]
        return machine.child(command, OMP_NUM_THREADS=str(threads), TORCHINDUCTOR_CACHE_DIR=cache)

    _, sequences, length, _, _ = SHAPES[shape]
    table = in_turns(shape, contestants, runs, spawn, _further)
    pairs = [
        (mine, theirs)
        for mine in contestants
        for theirs in contestants
        if mine.startswith("ours") and theirs.startswith("trainer")
    ]
    compared = ratios(table, pairs, ("tokens_per_second", "processor_ms_per_token", "peak_megabytes"))
    return {"sequences": sequences, "tokens_each": length, "contestants": table, "ratios": compared}


def _further(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "processor_ms_per_token": round(median(runs, "processor_ms_per_token"), 3),
        "model_gflops_per_second": round(median(runs, "model_gflops_per_second"), 1),
        "seconds_to_end_of_warm_up": [round(run["warm_up"], 1) for run in runs],
        "last_loss": round(runs[-1]["last_loss"], 4),
    }


# In the child


def _work(name: str, shape: str, import_only: bool) -> dict[str, Any]:
    contestant = _trainer if name.startswith("trainer") else _ours
    clock = Clock(shape)
    contestant(clock, name.endswith("compiled"), import_only)
    peak = peak_bytes()
    return {"peak": peak} if import_only else clock.result() | {"peak": peak}


class Clock:
    """Notes wall-clock and processor time at the end of every step."""

    def __init__(self, shape: str) -> None:
        self.preset, self.sequences, self.length, self.warm_up, self.measured = SHAPES[shape]
        self.steps = self.warm_up + self.measured
        self.loss = math.nan
        self.started = time.perf_counter()
        self.marks: list[tuple[float, float]] = []

    def tick(self) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))

    def result(self) -> dict[str, Any]:
        from mobilellm.accounting import training_flops_per_token
        from mobilellm.presets import preset

        assert len(self.marks) == self.steps, f"{len(self.marks)} steps were made, not {self.steps}"
        pairs = list(zip(self.marks[self.warm_up - 1 :], self.marks[self.warm_up :], strict=False))
        seconds, processor = (
            statistics.median(later[i] - earlier[i] for earlier, later in pairs) for i in (0, 1)
        )
        rate = self.sequences * self.length / seconds
        return {
            "tokens_per_second": rate,
            "processor_ms_per_token": 1e3 * processor / (self.sequences * self.length),
            "model_gflops_per_second": rate
            * training_flops_per_token(preset(self.preset), self.length)
            / 1e9,
            "warm_up": self.marks[self.warm_up - 1][0] - self.started,
            "last_loss": self.loss,
        }


def _tokens(clock: Clock, vocab_size: int) -> Any:
    """(steps * sequences, length + 1) random ids, the same for every contestant."""
    import numpy as np

    shape = (clock.steps * clock.sequences, clock.length + 1)
    return np.random.default_rng(0).integers(0, vocab_size, shape, dtype=np.int64)


def _ours(clock: Clock, compiled: bool, import_only: bool) -> None:
    """The loop itself, as `mobilellm train` runs it, on the batches the rival gets."""
    import numpy as np
    import torch
    from our_loop import first_steps

    from mobilellm.data.loader import Batch
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.presets import preset
    from mobilellm.train.settings import ComputeSettings, OptimSettings

    if import_only:
        return
    config = preset(clock.preset)
    rows = _tokens(clock, config.vocab_size)

    class Rows:
        """The rows in their order."""

        at = 0

        def next(self) -> Batch:
            part = rows[self.at : self.at + clock.sequences]
            self.at = (self.at + clock.sequences) % len(rows)
            return Batch(part[:, :-1], part[:, 1:], np.ones((len(part), clock.length), dtype=np.float32))

        def state(self) -> dict[str, int]:
            return {"at": self.at}

        def restore(self, state: dict[str, int]) -> None:
            self.at = state["at"]

    def on_record(record: dict[str, Any]) -> None:
        clock.loss = record["loss"]
        clock.tick()

    optim = OptimSettings(
        lr=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY, clip_norm=CLIP
    )
    model = MobileLLM(config, torch.Generator().manual_seed(0))
    compute = ComputeSettings(compile=compiled)
    first_steps(model, Rows(), clock.steps, clock.sequences, clock.length, optim, compute, on_record)


def _trainer(clock: Clock, compiled: bool, import_only: bool) -> None:
    import accelerate  # noqa: F401
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from mobilellm.presets import preset

    if import_only:
        return
    config = preset(clock.preset)
    torch.manual_seed(0)
    model = llama_of(config)
    rows = torch.from_numpy(_tokens(clock, config.vocab_size))

    class Ticking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
            clock.loss = (logs or {}).get("loss", clock.loss)

    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=model,
            args=TrainingArguments(
                folder,
                max_steps=clock.steps,
                per_device_train_batch_size=clock.sequences,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                weight_decay=DECAY,
                max_grad_norm=CLIP,
                optim="adamw_torch_fused",
                bf16=True,
                use_cpu=True,
                torch_compile=compiled,
                train_sampling_strategy="sequential",
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            # The model shifts the labels itself, so it is given as many tokens as ours sees.
            train_dataset=[{"input_ids": row[:-1], "labels": row[:-1]} for row in rows],
            callbacks=[Ticking()],
        ).train()


if __name__ == "__main__":
    main()
