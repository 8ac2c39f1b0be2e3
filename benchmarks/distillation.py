"""Does a student with a teacher beat the same student without one, at equal steps?

    python benchmarks/distillation.py WORK TEXT… --json docs/results/distillation.json

A tokenizer and a teacher of 0.8M parameters are trained on all of TEXT but what is held out. Students (160k)
then see a tenth of it many times over ("little"), or all of it about once ("all"), with the teacher and
without, three seeds each. All is kept in WORK: a command that was stopped goes on. Differences are of pairs
with the same seed; their interval is Student's t at 95 %.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from numpy.typing import NDArray

from mobilellm.cli.teachers import open_teacher
from mobilellm.config import ModelConfig
from mobilellm.data.loader import PackedLoader
from mobilellm.data.shards import read_split
from mobilellm.eval.perplexity import Perplexity, windowed
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.distillation_loss import distillation_loss
from mobilellm.train.distributed import World
from mobilellm.train.loop import train
from mobilellm.train.metrics import read_metrics
from mobilellm.train.settings import (
    BatchSettings,
    CheckpointSettings,
    OptimSettings,
    ScheduleSettings,
    TrainSettings,
)
from mobilellm.train.teacher_cache import CacheIdentity, open_cache
from mobilellm.train.teaching import TaughtLoader, fill

VOCABULARY, LENGTH = 1024, 128
MIXTURE, TEMPERATURE, TOP_K = {"ce_weight": 0.5, "kl_weight": 0.5}, 1.0, 64
REGIMES = {"little": 10, "all": 1}
"""Of the text students see one part in so many."""
T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}  # Student's t, by the number of pairs


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("work", type=Path)
    parser.add_argument("texts", type=Path, nargs="+", help="documents, for mobilellm prepare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES))
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no run after so many")
    parser.add_argument("--summary", action="store_true", help="only of the runs that are there")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    bench = Bench(arguments.work, arguments.texts)
    if arguments.summary:
        machine.write(arguments.json, bench.summary(arguments.regimes, arguments.seeds))
        return
    bench.trained("teacher", TEACHER, bench.text, steps=700, seed=0)
    for regime in arguments.regimes:
        tokens, steps = len(bench.text) // REGIMES[regime], 300
        for seed in arguments.seeds:
            for taught in (False, True):
                if time.monotonic() - started > arguments.seconds:
                    print("stopped; the same command goes on")
                    return
                name = f"{regime}-{'taught' if taught else 'plain'}-{seed}"
                bench.trained(name, STUDENT, bench.text[:tokens], steps, seed, taught)
    machine.write(arguments.json, bench.summary(arguments.regimes, arguments.seeds))


def shape(hidden: int, inner: int, layers: int) -> ModelConfig:
    return replace(
        preset("tiny"),
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_layers=layers,
        num_heads=hidden // 32,
        num_kv_heads=hidden // 64,
        head_dim=32,
        initializer_range=0.06,
    )


TEACHER, STUDENT = shape(128, 344, 4), shape(64, 176, 2)


class Bench:
    def __init__(self, work: Path, texts: list[Path]) -> None:
        self.work = work
        if not (work / "tokenizer").is_dir():
            run_tool("tokenizer", "train", *texts, "--vocab-size", VOCABULARY, "--out", work / "tokenizer")
        if not (work / "shards").is_dir():
            run_tool(
                "prepare",
                *texts,
                "--tokenizer",
                work / "tokenizer",
                "--out",
                work / "shards",
                "--held-out",
                0.1,
            )
        self.tokenizer = Tokenizer.load(work / "tokenizer")
        self.text = np.asarray(read_split(work / "shards", "train"))
        held_out = read_split(work / "shards", "held-out")
        self.held_out = np.asarray(held_out)[:50_000]
        self.num_bytes = self.tokenizer.num_bytes(self.held_out)

    def trained(
        self, name: str, config: ModelConfig, text: NDArray[Any], steps: int, seed: int, taught: bool = False
    ) -> None:
        """Train, and leave the model and its figures in WORK/name."""
        folder = self.work / name
        if self._is_there(name):
            return
        settings = TrainSettings(
            steps=steps,
            seed=seed,
            evaluate_every=steps,
            batch=BatchSettings(tokens_per_step=2048, sequence_length=LENGTH, micro_batch=16),
            optim=OptimSettings(name="muon", lr=1e-2),
            schedule=ScheduleSettings(name="wsd", warmup_steps=50, decay_fraction=0.3, final_fraction=0.05),
            checkpoint=CheckpointSettings(every=100, keep_last=1),
        )
        loader: Any = PackedLoader(text, LENGTH, settings.batch.sequences_per_step, seed)
        options: dict[str, Any] = {}
        if taught:
            loader = self._taught(loader, steps)
            options["loss_function"] = distillation_loss(TEMPERATURE, **MIXTURE)
        model = MobileLLM(config, torch.Generator().manual_seed(seed))
        if train(model, loader, settings, folder, **options).stopped:
            sys.exit("stopped; the same command goes on")
        model.eval()
        result = Perplexity(*windowed(model, self.held_out, LENGTH))
        steps_seen = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
        figures = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "steps": steps,
            "tokens_of_text": len(text),
            "epochs": steps * settings.batch.tokens_per_step / len(text),
            "held_out_loss": result.loss,
            "bits_per_byte": result.bits_per_byte(self.num_bytes),
            "seconds_a_step": statistics.median(record["seconds"] for record in steps_seen),
        }
        checkpoint.save(folder / "model", model, self.tokenizer, overwrite=True)
        (folder / "figures.json").write_text(json.dumps(figures, indent=2))
        print(f"{name:20} {figures['held_out_loss']:.4f} nats a token", flush=True)

    def _taught(self, loader: PackedLoader, steps: int) -> TaughtLoader:
        teacher = open_teacher(
            str(self.work / "teacher" / "model"), None, torch.device("cpu"), self.tokenizer, print
        )
        identity = CacheIdentity(
            teacher.fingerprint,
            self.tokenizer.fingerprint,
            teacher.vocab_size,
            TOP_K,
            TEMPERATURE,
            teacher.dtype,
        )
        cache = open_cache(self.work / "cache", identity)
        began = time.monotonic()
        if passages := fill(cache, loader, steps, teacher, World()):
            print(f"the teacher ran over {passages} passages in {time.monotonic() - began:.1f} s", flush=True)
        return TaughtLoader(loader, cache, MIXTURE)

    def summary(self, regimes: list[str], seeds: list[int]) -> dict[str, Any]:
        out: dict[str, Any] = {"teacher": self._figures("teacher"), "regimes": {}}
        for regime in regimes:
            names = [[f"{regime}-{kind}-{seed}" for kind in ("plain", "taught")] for seed in seeds]
            pairs = [list(map(self._figures, pair)) for pair in names if all(map(self._is_there, pair))]
            plain, taught = ([pair[number]["held_out_loss"] for pair in pairs] for number in range(2))
            gains = [a - b for a, b in zip(plain, taught, strict=True)]
            half = T_95[len(gains)] * statistics.stdev(gains) / math.sqrt(len(gains))
            mean = statistics.mean(gains)
            print(
                f"{regime:8} plain {statistics.mean(plain):.4f}, taught {statistics.mean(taught):.4f} nats a "
                f"token: better by {mean:.4f} ({mean - half:.4f} … {mean + half:.4f})"
            )
            out["regimes"][regime] = {
                "students": pairs,
                "plain": plain,
                "taught": taught,
                "gain": mean,
                "interval": [mean - half, mean + half],
            }
        return out

    def _is_there(self, name: str) -> bool:
        return (self.work / name / "figures.json").is_file()

    def _figures(self, name: str) -> dict[str, Any]:
        figures: dict[str, Any] = json.loads((self.work / name / "figures.json").read_text())
        return figures


def run_tool(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "mobilellm", *map(str, words)], check=True)


if __name__ == "__main__":
    main()
