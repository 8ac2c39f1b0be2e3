"""The whole of `eval chat`: figures by hand, and the loss against the model's own logits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tiny_baselines
import torch
from scripted_model import ScriptedModel

from mobilellm import load
from mobilellm.chat_template import DEFAULT, ChatTemplate
from mobilellm.data.holding_out import digest_of
from mobilellm.eval.chat import evaluate_chat, repetition
from mobilellm.eval.compare import Ratio, compare
from mobilellm.eval.conversations import read_conversations
from mobilellm.eval.intervals import wilson
from mobilellm.eval.torch_model import torch_model

ROWS = [
    {"instruction": f"Count to {number}.", "input": "", "output": " ".join(map(str, range(1, number + 1)))}
    for number in range(1, 9)
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(ROWS), encoding="utf-8")
    return path


def says(prompt: str) -> str | tuple[str, Any]:
    return ("one one one one one", "length") if "Count to 2." in prompt else "done"


def test_figures_by_hand(file: Path) -> None:
    told: list[tuple[int, int]] = []
    made, answered = evaluate_chat(
        ScriptedModel(says), read_conversations(file), 4, 30, lambda *each: told.append(each)
    )
    (result,) = made.results.values()
    tokens = sum(len(row["output"]) + 1 for row in ROWS)  # with the end of the turn
    assert (result["conversations"], result["tokens"], result["bytes"]) == (8, tokens, tokens - 8)
    assert result["loss"] == result["loss_low"] == result["loss_high"] == 1.0
    assert result["perplexity"] == pytest.approx(math.e)
    assert result["bits_per_byte"] == pytest.approx(tokens / math.log(2) / (tokens - 8))
    assert (result["answered"], result["stop_rate"]) == (4, 0.75)
    assert (result["stop_rate_low"], result["stop_rate_high"]) == wilson(3, 4)
    assert result["length"] == (3 * 4 + 19) / 4
    assert result["reference_length"] == sum(len(row["output"]) for row in ROWS[:4]) / 4
    assert result["repetition"] == repetition(list(map(ord, "one one one one one"))) / 4 > 0
    assert (result["over_context"], result["answers_over_context"], result["empty"]) == (0, 0, 0)
    assert made.items["rows.json"]["nats"] == [len(row["output"]) + 1 for row in ROWS]
    assert told[-1] == (12, 12)
    assert [each.reference for each in answered] == [row["output"] for row in ROWS[:4]]
    assert answered[1].completion is not None
    assert answered[1].completion.finish == "length"


def test_repetition() -> None:
    assert repetition([]) == repetition([1, 1, 1]) == repetition([1, 2, 3, 4, 5]) == 0
    assert repetition([7] * 8) == 1 - 1 / 5
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == 1 - 4 / 5


def test_the_loss_is_that_of_the_models_logits(file: Path, tmp_path: Path) -> None:
    directory = tiny_baselines.make("mobilellm-shared", tmp_path / "model")
    loaded = load(directory)
    assert loaded.tokenizer is not None
    conversations = read_conversations(file)
    made, _ = evaluate_chat(torch_model(loaded), conversations, 2, 5)
    chat, nats, count = ChatTemplate(DEFAULT, loaded.tokenizer), 0.0, 0
    for talk in conversations.talks:
        tokens, trained = chat.conversation(talk.messages, talk.tools)
        with torch.no_grad():
            scores = loaded.model(torch.tensor([tokens[:-1]])).log_softmax(-1)[0]
        for place, (token, counts) in enumerate(zip(tokens[1:], trained[1:], strict=True)):
            nats -= float(scores[place, token]) * counts
            count += counts
    (result,) = made.results.values()
    assert result["tokens"] == count
    assert result["loss"] == pytest.approx(nats / count, rel=1e-5)
    assert result["loss_low"] < result["loss"] < result["loss_high"]


def test_the_part_that_was_held_out(file: Path) -> None:
    everything = read_conversations(file)
    part = read_conversations(file, held_out=0.5)

    def is_held_out(talk: Any) -> bool:
        return digest_of(json.dumps([talk.messages, talk.tools], sort_keys=True)) < 2**63

    assert part.talks == [talk for talk in everything.talks if is_held_out(talk)]
    assert 0 < len(part.talks) < 8
    assert len(read_conversations(file, held_out=1e-9).talks) == 1  # one at least, as in training
    assert part.sha256 != everything.sha256


def test_over_the_context(file: Path) -> None:
    small = ScriptedModel(says, context=40)
    (result,) = evaluate_chat(small, read_conversations(file), 8)[0].results.values()
    assert 0 < result["over_context"] < 8
    assert result["conversations"] + result["over_context"] == 8
    file.write_text(json.dumps([{**ROWS[0], "instruction": "Count " * 9}, ROWS[0]]), encoding="utf-8")
    made, answered = evaluate_chat(small, read_conversations(file), answered=1)
    (result,) = made.results.values()
    assert (result["answers_over_context"], result["answered"]) == (1, 0)
    assert (result["conversations"], result["over_context"]) == (1, 1)
    assert answered[0].completion is None
    assert "stop_rate" not in result
    with pytest.raises(ValueError, match=r"rows\.json: none of its 2 conversations fits .* 20 tokens"):
        evaluate_chat(ScriptedModel(says, context=20), read_conversations(file))


def test_refused(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "no conversation"}\nno json\n', encoding="utf-8")
    for path, held_out, limit, complaint in (
        (tmp_path / "none.json", None, None, r"none\.json: no such file"),
        (other, None, None, r"other\.jsonl: holds no conversation \(1 .*, 1 .*\)"),
        (file, 1.0, None, "held_out = 1.0 must lie between 0 and 1"),
        (file, None, 0, "limit = 0 must be at least 1"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=complaint):
            read_conversations(path, held_out, limit)
    with pytest.raises(ValueError, match="answered = 0 must be at least 1"):
        evaluate_chat(ScriptedModel(says), read_conversations(file), 0)


def test_two_records_compared(file: Path) -> None:
    class Better(ScriptedModel):
        def log_likelihoods(self, requests: Any) -> Any:
            for number, answer in super().log_likelihoods(requests):
                yield number, answer._replace(tokens=answer.tokens / 2)

    one, other = (
        evaluate_chat(model(says), read_conversations(file))[0] for model in (ScriptedModel, Better)
    )
    (row,) = compare(one, other).rows
    assert isinstance(row, Ratio)
    assert (row.windows, row.won, row.lost, row.per) == (8, 8, 0, "token")
    assert row.ratio == row.ratio_low == row.ratio_high == 0.5
    assert row.perplexity_ratio == pytest.approx(math.exp(-0.5))
