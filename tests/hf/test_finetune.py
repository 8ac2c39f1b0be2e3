"""Trainer, PEFT and TRL fine-tune a tiny model that shares layers: losses fall, files hold the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import peft
import pytest
import torch
import trl
from hf_models import SCHEDULES, plain_model, shared_model, some_tokens, stock_twin
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from mobilellm.hf import MobileLLMForCausalLM, load_tokenizer
from mobilellm.model.checkpoint import read_weights
from mobilellm.tokenizer import Tokenizer

STEPS = 20
SETTINGS: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 4,
    "learning_rate": 2e-2,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "seed": 0,
}


def counting_rows(count: int = 16, length: int = 12) -> datasets.Dataset:
    """Rows of ids that count upwards: soon learnt."""
    rows = [[3 + (start + i) % 20 for i in range(length)] for start in range(count)]
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def losses(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_learnt(history: list[float]) -> None:
    assert len(history) == STEPS
    assert sum(history[-3:]) < 0.6 * sum(history[:3])


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_trainer(tmp_path: Path, gradient_checkpointing: bool) -> None:
    model = shared_model("reverse", 3, initializer_range=0.05)
    arguments = TrainingArguments(tmp_path, gradient_checkpointing=gradient_checkpointing, **SETTINGS)
    trainer = Trainer(model, arguments, train_dataset=counting_rows())
    assert_learnt(losses(trainer))
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(some_tokens()).logits, model.eval()(some_tokens()).logits)
    assert again.generation_config.use_cache is not False
    assert read_weights(tmp_path / "saved").repairs == ()


def test_trainer_takes_the_steps_that_stock_llama_takes(tmp_path: Path) -> None:
    """Without sharing: a shared block learns from all its steps, copies of it each from one."""
    histories = []
    model = plain_model(initializer_range=0.05)
    for each in (model, stock_twin(model)):
        arguments = TrainingArguments(tmp_path, **SETTINGS)
        histories.append(losses(Trainer(each, arguments, train_dataset=counting_rows())))
    assert histories[0] == pytest.approx(histories[1], rel=1e-4)


def test_peft_lora_trains_merges_and_saves(tmp_path: Path) -> None:
    shared_model("all-over", initializer_range=0.05).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(
        r=8, lora_alpha=32, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model = peft.get_peft_model(base, config)
    settings = SETTINGS | {"learning_rate": 5e-2}
    history = losses(Trainer(model, TrainingArguments(tmp_path, **settings), train_dataset=counting_rows()))
    assert sum(history[-3:]) < 0.95 * sum(history[:3])  # embedding, head and norms stand still
    expected = model.eval()(some_tokens()).logits

    model.save_pretrained(tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert not torch.allclose(fresh(some_tokens()).logits, expected, atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    torch.testing.assert_close(loaded(some_tokens()).logits, expected)

    at_once = AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(at_once(some_tokens()).logits, expected)

    merged = loaded.merge_and_unload()
    assert type(merged) is MobileLLMForCausalLM
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(some_tokens()).logits, expected, atol=1e-4, rtol=1e-4)
    twin = stock_twin(again, SCHEDULES["all-over", 2])
    torch.testing.assert_close(twin(some_tokens()).logits, expected, atol=1e-4, rtol=1e-4)


def test_trl_sft(tmp_path: Path) -> None:
    texts = [f"question {word}\nanswer {word[::-1]}\n" for word in ("one", "two", "three", "four")] * 4
    Tokenizer.train(texts, vocab_size=300).save(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path / "tokenizer")
    model = shared_model(vocab_size=300, initializer_range=0.05)
    arguments = trl.SFTConfig(tmp_path, max_length=32, **SETTINGS)
    trainer = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_dict({"text": texts}),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"][0, 0] == 1
    ends = batch["input_ids"] == 2
    assert ends.any(dim=1).all()
    assert (batch["labels"][ends] == 2).all()  # the end is learnt; padding, which is not the end, is not
    assert (batch["labels"][batch["input_ids"] == 0] == -100).all()
    assert_learnt(losses(trainer))
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(some_tokens()).logits, model.eval()(some_tokens()).logits)
