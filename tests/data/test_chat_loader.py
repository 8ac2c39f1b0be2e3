"""Packing: everything once an epoch, little padded, none sees another; exact resumption at any world size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from chat_data import conversations
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.data.chat import Conversations
from mobilellm.data.chat_loader import ChatLoader, ChatRows
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import PAD_ID
from mobilellm.train.loss import weighted_loss


def made(lengths: list[int]) -> Conversations:
    """Conversations of these lengths whose tokens all differ: 1, 2, 3, …; every third is trained."""
    tokens = np.arange(1, sum(lengths) + 1, dtype=np.int32)
    return Conversations(
        tokens, tokens % 3 == 0, np.cumsum(lengths, dtype=np.int64), np.arange(len(lengths), dtype=np.uint64)
    )


@given(st.lists(st.integers(2, 33), min_size=1, max_size=60), st.integers(0, 9), st.booleans())
@settings(max_examples=60, deadline=None)
def test_an_epoch_holds_everything_once(lengths: list[int], seed: int, packing: bool) -> None:
    found = made(lengths)
    rows = ChatRows(found, 32, seed, packing)
    for epoch in range(2):
        batch = rows.batch(epoch * rows.num_rows, rows.num_rows)
        assert batch.segments is not None
        counted = batch.weights > 0
        expected = [t for t in found.tokens if t % 3 == 0 and t - 1 not in found.starts]
        assert sorted(batch.targets[counted].tolist()) == expected
        read = batch.tokens != PAD_ID
        assert len(np.unique(batch.tokens[read])) == read.sum() == sum(lengths) - len(lengths)
        assert (batch.targets[read] == batch.tokens[read] + 1).all()
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
            assert (np.diff(segments) >= 0).all()
            for number in np.unique(segments[tokens != PAD_ID]):
                part = tokens[segments == number]
                assert (np.diff(part) == 1).all()
                assert part[0] - 1 in found.starts
                assert (part[-1] + 1) in found.ends
        if not packing:
            assert rows.num_rows == len(lengths)
            assert (batch.segments.max(axis=1) <= 1).all()
    everything = ChatRows(found, 32, seed, packing, assistant_only=False).batch(0, rows.num_rows)
    assert everything.weights.sum() == sum(lengths) - len(lengths)


def test_little_is_padded_and_epochs_differ() -> None:
    lengths = np.random.default_rng(0).integers(10, 300, 2000).tolist()
    rows = ChatRows(made(lengths), 512, 0)
    assert rows.filled > 0.99
    assert ChatRows(made(lengths), 512, 0, packing=False).filled < 0.4
    first, second = rows.batch(0, rows.num_rows), rows.batch(rows.num_rows, rows.num_rows)
    assert not np.array_equal(first.tokens, second.tokens)
    assert not np.array_equal(np.sort(first.tokens[:, 0]), np.sort(second.tokens[:, 0]))
    other = ChatRows(made(lengths), 512, 1).batch(0, rows.num_rows)
    assert not np.array_equal(first.tokens, other.tokens)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_resumption_and_world_size_change_nothing(world: int) -> None:
    found = made(np.random.default_rng(1).integers(2, 30, 50).tolist())
    whole = ChatLoader(ChatRows(found, 40, 3), 4)
    expected = [whole.next() for _ in range(12)]
    loaders = [ChatLoader(ChatRows(found, 40, 3), 4, rank, world) for rank in range(world)]
    for number in range(12):
        if number in (1, 7):  # every rank starts anew from the state of another
            states = [loader.state() for loader in loaders]
            assert all(state == states[0] for state in states)
            loaders = [ChatLoader(ChatRows(found, 40, 3), 4, rank, world) for rank in range(world)]
            for loader in loaders:
                loader.restore(states[0])
        parts = [loader.next() for loader in loaders]
        for column, wanted in zip(
            zip(*(part[:4] for part in parts), strict=True), expected[number][:4], strict=True
        ):
            assert np.array_equal(np.concatenate(column), wanted)


def test_other_data_is_not_gone_on_with() -> None:
    state = ChatLoader(ChatRows(made([5, 6, 7]), 8, 0), 1).state()
    for other in (
        ChatRows(made([5, 6, 8]), 8, 0),
        ChatRows(made([5, 6, 7]), 9, 0),
        ChatRows(made([5, 6, 7]), 8, 1),
        ChatRows(made([5, 6, 7]), 8, 0, packing=False),
        ChatRows(made([5, 6, 7]), 8, 0, assistant_only=False),
    ):
        with pytest.raises(ValueError, match="resume with the same files, template"):
            ChatLoader(other, 1).restore(state)
    with pytest.raises(ValueError, match="rows = -1 in the checkpoint"):
        ChatLoader(ChatRows(made([5, 6, 7]), 8, 0), 1).restore({**state, "rows": -1})


def test_refusals() -> None:
    with pytest.raises(ValueError, match="a conversation has 12 tokens, and a sequence reads 10"):
        ChatRows(made([12]), 10, 0)
    with pytest.raises(ValueError, match="fill 1 sequences, fewer than the 2 of one step"):
        ChatLoader(ChatRows(made([5, 5]), 10, 0), 2)
    with pytest.raises(ValueError, match="3 sequences a step cannot be shared by 2 devices"):
        ChatLoader(ChatRows(made([9, 9, 9]), 10, 0), 3, 0, 2)


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.02)])
@pytest.mark.parametrize("name", ["test", "test-ls"])
def test_packed_is_one_conversation_at_a_time(
    tmp_path: Path, name: str, precision: str, tolerance: float
) -> None:
    """Loss and gradients; by-hand cross-entropy of each conversation alone is the third way."""
    found = conversations(tmp_path, 6, 97)
    model = MobileLLM(preset(name), torch.Generator().manual_seed(0)).train()
    losses, gradients = [], []
    for packing in (True, False):
        model.zero_grad()
        rows = ChatRows(found, 96, 0, packing)
        batch = [torch.from_numpy(part) for part in rows.batch(0, rows.num_rows) if part is not None]
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = weighted_loss(model, *batch[:3], segments=batch[3])
        loss.backward()
        losses.append(loss.item())
        gradients.append(
            torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])
        )
    by_hand = 0.0
    with torch.no_grad():
        for start, end in zip(found.starts, found.ends, strict=True):
            tokens = torch.from_numpy(found.tokens[start:end].astype(np.int64))
            logits = model(tokens[None, :-1])[0].double().log_softmax(-1)
            nats = -logits.gather(-1, tokens[1:, None])[:, 0]
            by_hand += float(nats[torch.from_numpy(found.trained[start + 1 : end])].sum())
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)
    assert losses[0] == pytest.approx(by_hand, rel=tolerance)
    assert (gradients[0] - gradients[1]).norm() < tolerance * gradients[1].norm()
