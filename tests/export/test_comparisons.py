"""Figures and bars, on answers made up for the purpose."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.config import ModelConfig
from mobilellm.export.check import Check, count_check
from mobilellm.export.comparisons import chat_checks, fidelity, inventory_checks, stop_check
from mobilellm.export.questions import Answers, ChatQuestion, Questions
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


def test_a_figure_that_is_no_number_is_no_pass() -> None:
    assert Check("x", 0.5, 0.5, "").passed
    assert not Check("x", 0.6, 0.5, "").passed
    assert not Check("x", None, 0.5, "").passed
    assert not Check("x", math.nan, 0.5, "").passed
    assert count_check("x", "faults", ["p", "q", "r", "s"], "").detail == "p; q; r and 1 more"


@pytest.mark.parametrize(
    ("stopped", "passes"),
    [
        ((5, 6, 7, 2), True),  # ends with the stop token
        ((5, 6, 7), True),  # keeps it to itself
        ((5, 2), True),  # the model wanted to stop before
        ((5, 6, 7, 2, 8, 9, 4), False),
        ((5, 6, 7, 8, 9, 4, 4), False),
    ],
)
def test_generation_must_end_with_the_stop_token(stopped: tuple[int, ...], passes: bool) -> None:
    assert stop_check(INVENTORY, INVENTORY, answers(0, stopped=stopped), QUESTIONS).passed == passes


def test_other_stop_tokens_are_named() -> None:
    done = answers(0, stopped=(5, 6, 7, 2))
    found = stop_check(replace(INVENTORY, stop_ids=frozenset({7})), INVENTORY, done, QUESTIONS)
    assert found.detail == "the artefact does not name 2 as stop token; the artefact stops at 7"


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"config": replace(CONFIG, rope_theta=5e5)}, "configuration"),
        ({"config": replace(CONFIG, tie_word_embeddings=False)}, "tied head"),
        ({"tensors": {"a": Stored((2, 3), "Q8_0")}}, "tensors"),
        ({"tensors": {**INVENTORY.tensors, "c": Stored((1,), "F32")}}, "tensors"),
        ({"tensors": {**INVENTORY.tensors, "a": Stored((3, 2), "Q8_0")}}, "tensors"),
        ({"tensors": {**INVENTORY.tensors, "a": Stored((2, 3), "F16")}}, "types"),
        ({"bytes": 106_000}, "bytes"),
        ({"bytes": 94_000}, "bytes"),
    ],
)
def test_what_lies_in_it_is_compared(change: dict[str, object], name: str) -> None:
    assert all(check.passed for check in inventory_checks(INVENTORY, INVENTORY))
    found = inventory_checks(replace(INVENTORY, **change), INVENTORY)  # type: ignore[arg-type]
    assert [check.name for check in found if not check.passed] == [name]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.1, 5))
def test_fidelity_is_what_torch_computes(seed: int, scale: float) -> None:
    theirs, ours = answers(seed, scale), answers(seed + 1, scale)
    measured = fidelity(theirs, QUESTIONS, ours.logits, theirs.logits)
    first, second = (
        torch.log_softmax(torch.from_numpy(np.concatenate(each.logits)).double(), -1)
        for each in (ours, theirs)
    )
    kl = torch.nn.functional.kl_div(second, first, log_target=True, reduction="batchmean").item()
    assert measured.kl == measured.cost == pytest.approx(kl, rel=1e-4, abs=1e-6)
    rows, following = [0, 1, 2, 4, 5], [3, 4, 5, 6, 7]
    nats = torch.nn.functional.nll_loss(second[rows], torch.tensor(following)).item()
    assert measured.perplexity == pytest.approx(math.exp(nats), rel=1e-4)


# A model to talk to


CHAT = ChatQuestion([{"role": "user", "content": "x"}], [1, 4, 2, 5], 6)
WANTED = [7, 8, 2]
"""What the reference says, </s> last."""


def chat(found: list[int] | None, said: list[int]) -> list[Check]:
    """The checks of an artefact that makes these ids of the conversation and answers so."""

    def reference(tokens: object) -> np.ndarray:
        logits = np.zeros((len(tokens), 11), np.float32)  # type: ignore[arg-type]
        for step, token in enumerate(WANTED):
            logits[min(len(CHAT.ids) - 1 + step, len(logits) - 1), token] = 5.0
        return logits

    windows = [np.zeros((len(window), 11), np.float32) for window in QUESTIONS.windows]
    given = replace(answers(0), logits=windows, chat=found, said=said)
    return chat_checks(given, replace(QUESTIONS, chat=CHAT), 11, reference, windows)


@pytest.mark.parametrize(
    ("found", "said", "fault"),
    [
        ([1, 4, 2, 5], [7, 8, 2], ""),
        ([1, 4, 2, 5], [7, 8], ""),  # keeps the stop token to itself
        ([1, 4, 2, 5], [7, 8, 9, 9, 9, 9], "token 2 (9)"),  # goes on
        ([1, 4, 2, 5], [7, 2], "it stops after 1 tokens"),
        ([1, 4, 2, 5], [], "it stops after 0 tokens"),
        ([1, 1, 4, 2, 5], [7, 8, 2], "token 1 stands twice in front"),
        ([4, 2, 5], [7, 8, 2], "3 ids, of the source 4; they differ from the 1th on"),
        (None, [], "the artefact has no chat template, and its source has"),
    ],
)
def test_chats_are_told_and_ended_as_by_the_source(
    found: list[int] | None, said: list[int], fault: str
) -> None:
    checks = chat(found, said)
    assert [check.name for check in checks] == ["chat prompt", "stops as its source does"]
    assert all(check.passed for check in checks) == (fault == "")
    assert fault in "; ".join(check.detail for check in checks if not check.passed)


def test_a_base_model_is_asked_no_chat() -> None:
    assert chat_checks(answers(0), QUESTIONS, 11, lambda tokens: np.zeros((1, 1), np.float32), []) == []
