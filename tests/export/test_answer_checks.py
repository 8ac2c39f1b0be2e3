"""What must be said, and what is told of who says something else: on answers made up for the purpose."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from made_up_answers import INVENTORY, QUESTIONS, answers

from mobilellm.export.answer_checks import chat_checks, stop_check
from mobilellm.export.check import Check
from mobilellm.export.questions import ChatQuestion


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


# A model to talk to


CHAT = ChatQuestion([{"role": "user", "content": "x"}], [1, 4, 2, 5], 6)
WANTED = [7, 8, 2]
"""What the reference says, </s> last."""


def chat(found: list[int] | None, said: list[int]) -> list[Check]:
    """The checks of an artefact that makes these ids of the conversation and answers so."""

    def reference(tokens: object) -> np.ndarray:
        logits = np.zeros((len(tokens), 11), np.float32)  # type: ignore[arg-type]
        for place, token in zip(range(len(CHAT.ids) - 1, len(logits)), WANTED, strict=False):
            logits[place, token] = 5.0
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
