"""An artefact and its answers, made up: figures and bars are tested on them."""

from __future__ import annotations

import numpy as np

from mobilellm.config import ModelConfig
from mobilellm.export.questions import Answers, Questions
from mobilellm.export.targets import Inventory, Stored

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=8, intermediate_size=8, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4,
    max_position_embeddings=16,
)  # fmt: skip
INVENTORY = Inventory(
    CONFIG, {"a": Stored((2, 3), "Q8_0"), "b": Stored((3,), "F32")}, frozenset({2}), 100_000
)
QUESTIONS = Questions([], [[1, 3, 4, 5], [1, 6, 7]], [1, 3], [1, 3], 2, (3, 2))


def answers(seed: int, scale: float = 1.0, stopped: tuple[int, ...] = ()) -> Answers:
    random = np.random.default_rng(seed)
    logits = [random.normal(size=(len(w), 11), scale=scale).astype(np.float32) for w in QUESTIONS.windows]
    return Answers("r", [], logits, logits[0][:2], [1, 1], list(stopped))
