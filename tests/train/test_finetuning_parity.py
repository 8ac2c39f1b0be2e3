"""Fine-tuning by the loop and by TRL's SFTTrainer: the same model, conversations and order, the same losses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from chat_data import conversations, tokenizer
from tiny_runs import tiny_settings

from mobilellm.data.chat import Conversations
from mobilellm.data.chat_loader import ChatLoader, ChatRows
from mobilellm.model import checkpoint
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.train.loop import train
from mobilellm.train.loss import weighted_loss
from mobilellm.train.metrics import read_metrics

pytestmark = pytest.mark.slow
STEPS, ROWS, LENGTH = 24, 4, 120


def ours(found: Conversations, model: MobileLLM, folder: Path, packing: bool) -> list[float]:
    """Losses of every step; a step holds `ROWS` conversations, or as many packed rows."""
    settings = tiny_settings(
        steps=STEPS, tokens_per_step=ROWS * LENGTH, sequence_length=LENGTH, micro_batch=2, every=STEPS,
        lr=3e-3, weight_decay=0.01, beta2=0.999, warmup_steps=0, final_fraction=1.0,
    )  # fmt: skip
    train(model, ChatLoader(ChatRows(found, LENGTH, 5, packing), ROWS), settings, folder)
    return [record["loss"] for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]


def of_trl(found: Conversations, start: Path, folder: Path) -> tuple[list[float], MobileLLM]:
    """The same conversations, in the order in which ours come."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    first = ChatRows(found, LENGTH, 5, packing=False).positions(0, STEPS * ROWS)[0][:, 0]
    order = np.searchsorted(found.starts, first)
    rows = []
    for number in order:
        part = slice(found.starts[number], found.ends[number])
        labels = np.where(found.trained[part], found.tokens[part], -100)
        rows.append({"input_ids": found.tokens[part].tolist(), "labels": labels.tolist()})
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(start),
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            str(folder), max_steps=STEPS, per_device_train_batch_size=ROWS, learning_rate=3e-3, adam_beta2=0.999,
            adam_beta1=0.9, adam_epsilon=1e-8, weight_decay=0.01, max_grad_norm=1.0, lr_scheduler_type="constant",
            train_sampling_strategy="sequential", shuffle_dataset=False, logging_steps=1, save_strategy="no",
            report_to=[], disable_tqdm=True, use_cpu=True, bf16=False, gradient_checkpointing=False,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
    )  # fmt: skip
    trainer.train()
    trainer.save_model(folder / "model")
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, checkpoint.build(checkpoint.read_weights(folder / "model"))


@torch.no_grad()
def held_out_loss(model: MobileLLM, found: Conversations) -> float:
    rows = ChatRows(found, LENGTH, 0)
    batch = rows.batch(0, rows.num_rows)
    parts = [torch.from_numpy(part) for part in batch if part is not None]
    return float(weighted_loss(model.eval(), *parts[:3], segments=parts[3])) / float(batch.weights.sum())


def test_the_same_losses_as_trl(tmp_path: Path) -> None:
    for package in ("trl", "datasets", "transformers"):
        pytest.importorskip(package)
    torch.set_num_threads(1)
    found, held_out = conversations(tmp_path, 60, LENGTH + 1), conversations(tmp_path, 20, LENGTH + 1, seed=7)
    config = replace(preset("test"), vocab_size=tokenizer().vocab_size)

    def fresh() -> MobileLLM:
        return MobileLLM(config, torch.Generator().manual_seed(0))

    checkpoint.save(tmp_path / "start", fresh(), tokenizer(), layout="llama")
    theirs, their_model = of_trl(found, tmp_path / "start", tmp_path / "trl")
    model = fresh()
    losses = ours(found, model, tmp_path / "ours", packing=False)
    assert losses == pytest.approx(theirs, rel=2e-3)
    assert losses[-1] < 0.8 * losses[0]
    ended, rival = held_out_loss(model, held_out), held_out_loss(their_model, held_out)
    assert ended == pytest.approx(rival, rel=5e-3)
    # Packed, a step holds other conversations, but as many tokens are learnt in the end.
    packed = fresh()
    ours(found, packed, tmp_path / "packed", packing=True)
    assert held_out_loss(packed, held_out) < 1.02 * rival
