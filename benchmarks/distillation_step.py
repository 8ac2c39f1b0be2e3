"""What a step of distillation takes beside a plain one, where the teacher's cache is complete.

    python benchmarks/distillation_step.py --json out.json

Steps of the training loop itself, kinds in turns, of a model of 8M parameters with a vocabulary of 8,192 on
random tokens. The teacher that filled the cache is tiny and random: a step does not depend on what it said.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import machine
import numpy as np
import torch
from torch import Tensor

from mobilellm.data.loader import PackedLoader
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.train.distillation_loss import distillation_loss
from mobilellm.train.distributed import World
from mobilellm.train.loop import train
from mobilellm.train.settings import BatchSettings, CheckpointSettings, ScheduleSettings, TrainSettings
from mobilellm.train.teacher_cache import CacheIdentity, TeacherCache, open_cache
from mobilellm.train.teaching import TaughtLoader, fill

VOCABULARY, LENGTH, SEQUENCES, TOP_K = 8192, 512, 8, 64
MIXTURE = {"ce_weight": 0.5, "kl_weight": 0.5}
KINDS = {"plain": None, "T = 1": 1.0, "T = 2": 2.0}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, default=7, help="of each kind in a round; the first does not count"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    machine.write(arguments.json, cached_teacher(arguments.rounds, arguments.steps))


def cached_teacher(rounds: int = 4, steps: int = 7) -> dict[str, Any]:
    """Seconds of a step of each kind, and how many times those of a plain one."""
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        caches = {
            kind: _filled(Path(folder) / f"cache-{number}", temperature, steps)
            for number, (kind, temperature) in enumerate(KINDS.items())
            if temperature is not None
        }
        for number in range(rounds):
            for place, kind in enumerate(KINDS):
                found = _run(Path(folder) / f"run-{number}-{place}", KINDS[kind], caches.get(kind), steps)
                seconds[kind] += found[1:]
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    return {
        "tokens_a_step": LENGTH * SEQUENCES,
        "threads": torch.get_num_threads(),
        "seconds": medians,
        "times_plain": {kind: value / medians["plain"] for kind, value in medians.items()},
    }


def _loader() -> PackedLoader:
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 64 * LENGTH)
    return PackedLoader(tokens, LENGTH, SEQUENCES, seed=0)


class _Teacher:
    name, fingerprint, dtype, device = "random", "random", "float32", torch.device("cpu")
    context, vocab_size = LENGTH, VOCABULARY

    def __init__(self) -> None:
        shape = replace(preset("test"), vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
        self._model = MobileLLM(shape, torch.Generator().manual_seed(1))

    def states(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self._model.hidden(tokens).flatten(0, 1)[places]

    def logits(self, states: Tensor) -> Tensor:
        return self._model.logits(states)


def _filled(directory: Path, temperature: float, steps: int) -> TeacherCache:
    identity = CacheIdentity("random", "random", VOCABULARY, TOP_K, temperature, "float32")
    cache = open_cache(directory, identity)
    fill(cache, _loader(), steps, _Teacher(), World())
    return cache


def _run(directory: Path, temperature: float | None, cache: TeacherCache | None, steps: int) -> list[float]:
    settings = TrainSettings(
        steps=steps,
        evaluate_every=steps,
        batch=BatchSettings(
            tokens_per_step=LENGTH * SEQUENCES, sequence_length=LENGTH, micro_batch=SEQUENCES
        ),
        schedule=ScheduleSettings(warmup_steps=1),
        checkpoint=CheckpointSettings(every=steps),
    )
    shape = replace(preset("tiny"), vocab_size=VOCABULARY, initializer_range=0.05)
    model, loader, options = MobileLLM(shape, torch.Generator().manual_seed(0)), _loader(), {}
    if temperature is not None and cache is not None:
        loader = TaughtLoader(loader, cache, MIXTURE)
        options = {"loss_function": distillation_loss(temperature, **MIXTURE)}
    found: list[float] = []
    outcome = train(
        model,
        loader,
        settings,
        directory,
        on_record=lambda record: found.extend([record["seconds"]] if "loss" in record else []),
        **options,
    )
    if outcome.stopped:
        sys.exit("stopped")
    return found


if __name__ == "__main__":
    main()
