"""A student with a teacher against the same student without one, on real prose, at equal steps."""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_runs import LS, ORDINARY, tiny_settings
from tiny_teachers import TinyTeacher

from mobilellm.config import ModelConfig
from mobilellm.data.loader import PackedLoader
from mobilellm.eval.perplexity import Perplexity, windowed
from mobilellm.model.transformer import MobileLLM
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.distillation_loss import distillation_loss
from mobilellm.train.distributed import World
from mobilellm.train.loop import train
from mobilellm.train.teacher_cache import CacheIdentity, open_cache
from mobilellm.train.teaching import TaughtLoader, fill

T_95 = 4.303  # Student's t, two degrees of freedom
MIXTURE = {"ce_weight": 0.5, "kl_weight": 0.5}
TEACHER, STUDENT = replace(ORDINARY, initializer_range=0.05), replace(LS, initializer_range=0.05)


@pytest.mark.slow
def test_where_text_is_scarce_the_student_of_a_teacher_is_better(tmp_path: Path, small_text: Path) -> None:
    """The teacher saw ten times as much text. Three seeds; the interval of the differences is above nought."""
    text = small_text.read_text("utf-8")
    tokens = np.array(Tokenizer.train([text], 384).encode(text))
    held_out, known = tokens[:8_000], tokens[8_000:]
    teacher = TinyTeacher()
    teacher.model = trained(TEACHER, known, 400, 0, tmp_path / "teacher")
    identity = CacheIdentity("t", "t", LS.vocab_size, 64, 1.0, "float32")
    cache = open_cache(tmp_path / "cache", identity)
    gains = []
    for seed in (1, 2, 3):
        some = known[: len(known) // 10]
        plain, taught = (
            loss_of(trained(STUDENT, some, 150, seed, tmp_path / f"{seed}-{number}", *told), held_out)
            for number, told in enumerate(((), (cache, teacher)))
        )
        gains.append(plain - taught)
    half = T_95 * statistics.stdev(gains) / len(gains) ** 0.5
    mean = statistics.mean(gains)
    print(
        f"better by {mean:.3f} nats a token ({mean - half:.3f} … {mean + half:.3f}); teacher {teacher.tokens}"
    )
    assert mean - half > 0


def trained(
    config: ModelConfig, text: NDArray[Any], steps: int, seed: int, directory: Path, *told: Any
) -> MobileLLM:
    settings = tiny_settings(
        steps=steps, seed=seed, evaluate_every=steps, every=steps, tokens_per_step=1024, sequence_length=64,
        micro_batch=16, warmup_steps=20,
    )  # fmt: skip
    loader: Any = PackedLoader(text, 64, 16, seed)
    options: dict[str, Any] = {}
    if told:
        cache, teacher = told
        fill(cache, loader, steps, teacher, World())
        loader = TaughtLoader(loader, cache, MIXTURE)
        options["loss_function"] = distillation_loss(1.0, **MIXTURE)
    model = MobileLLM(config, torch.Generator().manual_seed(seed))
    train(model, loader, settings, directory, **options)
    return model.eval()


def loss_of(model: MobileLLM, text: NDArray[Any]) -> float:
    return Perplexity(*windowed(model, text, 64)).loss
