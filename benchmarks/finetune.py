"""Fine-tuning speed and peak memory, ours against TRL's SFTTrainer, as a user would run each.

    python benchmarks/finetune.py conversations.jsonl --tokenizer DIR --json docs/results/finetune.json

Same shape, conversations, sequence length, sequences a step and optimiser (fused AdamW, clipping at 1.0),
weights float32, matrix products bfloat16, no activation checkpointing, loss on the assistant's tokens. Both
pack by best fit and keep conversations apart. TRL puts the sequences of a step into one long one ("trl") or,
told to take one at a time and accumulate, leaves them as they are ("trl-rows"). Every run is a fresh process;
runs of the contestants alternate. Counted are tokens of conversations, not padding. Peak memory is the
process's own, less that of a process which only imported the same packages. The vocabulary is the
tokenizer's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Nothing heavy here: a child's peak memory includes its parent's at the fork.
import machine
from contest import in_turns, median, peak_bytes, ratios
from rival_llama import llama_of

SHAPES = {
    #        preset  sequences × tokens, steps before and in the measurement
    "tiny": ("tiny", 8, 512, 3, 8),
    "125m": ("125m", 2, 512, 1, 3),
    "test": ("test", 2, 64, 1, 3),  # a trial of this script, not a measurement
}
LEARNING_RATE, BETAS, DECAY, CLIP = 2e-5, (0.9, 0.999), 0.01, 1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", type=Path, nargs="*", help="files of conversations")
    parser.add_argument("--tokenizer", type=Path, help="directory, tokenizer.json or tokenizer.model")
    parser.add_argument("--shapes", nargs="+", default=["tiny", "125m"], choices=list(SHAPES))
    parser.add_argument(
        "--contestants", nargs="+", default=["ours", "trl", "trl-rows"], choices=list(CONTESTANTS)
    )
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("CONTESTANT", "SHAPE", "DATA"), help=argparse.SUPPRESS)
    parser.add_argument("--import-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(_work(*arguments.worker, arguments.import_only)))
        return
    if not arguments.files or arguments.tokenizer is None:
        parser.error("name files of conversations, and --tokenizer")
    results: dict[str, Any] = {"threads": arguments.threads, "runs": arguments.runs}
    with tempfile.TemporaryDirectory() as folder:
        for shape in arguments.shapes:
            data = Path(folder) / f"{shape}.npz"
            facts = machine.child(
                [
                    sys.executable,
                    __file__,
                    "--encode",
                    str(data),
                    shape,
                    str(arguments.tokenizer),
                    *map(str, arguments.files),
                ]
            )
            results[shape] = facts | _compare(shape, data, arguments)
    machine.write(arguments.json, results)


def _encode(data: Path, shape: str, tokenizer: str, files: list[str]) -> dict[str, Any]:
    """Encode once, for all contestants alike."""
    import numpy as np

    from mobilellm.chat_template import DEFAULT, ChatTemplate
    from mobilellm.data.chat import read_chat
    from mobilellm.tokenizer import Tokenizer

    _, _, length, _, _ = SHAPES[shape]
    template = ChatTemplate(DEFAULT, Tokenizer.load(tokenizer))
    read = read_chat([Path(file) for file in files], template, length)
    found = read.conversations
    vocabulary = template.tokenizer.vocab_size
    np.savez(
        data,
        vocab_size=vocabulary,
        tokens=found.tokens,
        trained=found.trained,
        ends=found.ends,
        digests=found.digests,
    )
    return {
        "vocab_size": vocabulary,
        "conversations": len(found),
        "tokens": len(found.tokens),
        "left_out": read.counts,
    }


def _compare(shape: str, data: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    def spawn(name: str, import_only: bool) -> dict[str, Any]:
        flags = ["--import-only"] * import_only
        command = [sys.executable, __file__, "--worker", name, shape, str(data), *flags]
        return machine.child(command, OMP_NUM_THREADS=str(arguments.threads))

    names: list[str] = arguments.contestants
    _, sequences, length, _, _ = SHAPES[shape]
    table = in_turns(shape, names, arguments.runs, spawn, _further)
    pairs = [
        (mine, theirs) for mine in names for theirs in names if mine.startswith("ours") and theirs != mine
    ]
    compared = ratios(table, pairs, ("tokens_per_second", "peak_megabytes"))
    return {"sequences": sequences, "tokens_each": length, "contestants": table, "ratios": compared}


def _further(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "filled": round(median(runs, "filled"), 4),
        "first_loss": round(runs[-1]["losses"][0], 4),
        "last_loss": round(runs[-1]["losses"][-1], 4),
    }


# In the child


def _work(name: str, shape: str, data: str, import_only: bool) -> dict[str, Any]:
    clock = Clock(shape)
    CONTESTANTS[name](clock, Path(data), import_only)
    peak = peak_bytes()
    return {"peak": peak} if import_only else clock.result() | {"peak": peak}


class Clock:
    """Notes the time at the end of every step, and how many tokens of conversations it had."""

    def __init__(self, shape: str) -> None:
        self.preset, self.sequences, self.length, self.warm_up, self.measured = SHAPES[shape]
        self.steps = self.warm_up + self.measured
        self.losses: list[float] = []
        self.tokens: list[int] = []
        """Of every step, as its batch was made."""
        self.marks: list[float] = []

    def tick(self) -> None:
        self.marks.append(time.perf_counter())

    def result(self) -> dict[str, Any]:
        assert len(self.marks) == self.steps <= len(self.tokens)
        seconds = self.marks[-1] - self.marks[self.warm_up - 1]
        tokens = sum(self.tokens[self.warm_up : self.steps])
        return {
            "tokens_per_second": tokens / seconds,
            "filled": tokens / (self.measured * self.sequences * self.length),
            "losses": self.losses,
        }


def _subject(clock: Clock, data: Path) -> tuple[Any, Any]:
    """The model's shape and the conversations."""
    from dataclasses import replace

    import numpy as np

    from mobilellm.data.chat import Conversations
    from mobilellm.presets import preset

    stored = dict(np.load(data))
    return replace(preset(clock.preset), vocab_size=int(stored.pop("vocab_size"))), Conversations(**stored)


def _ours(clock: Clock, data: Path, import_only: bool, **adapters: bool) -> None:
    """The loop itself, as `mobilellm finetune` runs it; with [lora] of its defaults changed by `adapters`."""
    import torch
    from our_loop import first_steps

    from mobilellm.data.chat_loader import ChatLoader, ChatRows
    from mobilellm.data.loader import Batch
    from mobilellm.model.adapters import adapt, narrow
    from mobilellm.model.transformer import MobileLLM
    from mobilellm.train.lora import LoraChoice
    from mobilellm.train.settings import ComputeSettings, OptimSettings

    if adapters:
        import peft  # noqa: F401
    if import_only:
        return

    class Counting(ChatLoader):
        def next(self) -> Batch:
            first = self.state()["rows"]
            positions, segments = self.rows.positions(first, clock.sequences)
            there = positions >= 0
            conversations = sum(len(set(row[real])) for row, real in zip(segments, there, strict=True))
            clock.tokens.append(int(there.sum()) + conversations)  # the last of each is predicted, not read
            return super().next()

    def on_record(record: dict[str, Any]) -> None:
        clock.losses.append(record["loss"])
        clock.tick()

    optim = OptimSettings(
        lr=LEARNING_RATE, beta1=BETAS[0], beta2=BETAS[1], weight_decay=DECAY, clip_norm=CLIP
    )
    config, found = _subject(clock, data)
    model = MobileLLM(config, torch.Generator().manual_seed(0))
    if adapters:
        adapt(model, **asdict(LoraChoice(**adapters)), seed=0)
        narrow(model)
    loader = Counting(ChatRows(found, clock.length, 0), clock.sequences)
    first_steps(
        model, loader, clock.steps, clock.sequences, clock.length, optim, ComputeSettings(), on_record
    )


def _ours_lora(clock: Clock, data: Path, import_only: bool) -> None:
    _ours(clock, data, import_only, dora=False)


def _ours_dora(clock: Clock, data: Path, import_only: bool) -> None:
    _ours(clock, data, import_only, dora=True)


def _trl(clock: Clock, data: Path, import_only: bool, at_once: bool = True) -> None:
    import numpy as np
    import torch
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from mobilellm.tokenizer import Tokenizer

    if import_only:
        return

    class Ticking(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.tick()

        def on_log(self, _arguments: Any, _state: Any, _control: Any, logs: Any = None, **__: Any) -> None:
            clock.losses += [logs["loss"]] if logs and "loss" in logs else []

    config, found = _subject(clock, data)
    rows = []
    for start, end in zip(found.starts, found.ends, strict=True):
        labels = np.where(found.trained[start:end], found.tokens[start:end], -100)
        rows.append({"input_ids": found.tokens[start:end].tolist(), "labels": labels.tolist()})
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer.train(["a b"], 262, min_frequency=1).save(folder)  # SFTTrainer asks it only for the padding
        trainer = SFTTrainer(
            model=llama_of(config),
            processing_class=PreTrainedTokenizerFast.from_pretrained(folder),
            train_dataset=Dataset.from_list(rows),
            args=SFTConfig(
                folder,
                max_steps=clock.steps,
                max_length=clock.length,
                packing=True,
                per_device_train_batch_size=clock.sequences if at_once else 1,
                gradient_accumulation_steps=1 if at_once else clock.sequences,
                learning_rate=LEARNING_RATE,
                lr_scheduler_type="constant",
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                weight_decay=DECAY,
                max_grad_norm=CLIP,
                optim="adamw_torch_fused",
                bf16=True,
                use_cpu=True,
                gradient_checkpointing=False,
                logging_steps=1,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            ),
            callbacks=[Ticking()],
        )
        collate: Callable[[Any], Any] = trainer.data_collator
        parts: list[int] = []

        def counted(examples: Any) -> Any:
            parts.append(sum(len(example["input_ids"]) for example in examples))
            return collate(examples)

        trainer.data_collator = counted
        trainer.train()
    per_step = 1 if at_once else clock.sequences
    clock.tokens += [sum(parts[i : i + per_step]) for i in range(0, len(parts), per_step)]


def _trl_rows(clock: Clock, data: Path, import_only: bool) -> None:
    _trl(clock, data, import_only, at_once=False)


CONTESTANTS: dict[str, Callable[[Clock, Path, bool], None]] = {
    "ours": _ours, "ours-lora": _ours_lora, "ours-dora": _ours_dora, "trl": _trl, "trl-rows": _trl_rows,
}  # fmt: skip
"""Another kind of run (an adapter, a teacher) is another function here."""


if __name__ == "__main__":
    if sys.argv[1:2] == ["--encode"]:
        print(json.dumps(_encode(Path(sys.argv[2]), sys.argv[3], sys.argv[4], sys.argv[5:])))
    else:
        main()
