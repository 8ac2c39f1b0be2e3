"""Preference tuning of a chat model: DPO (Rafailov et al. 2023, arXiv 2305.18290) by TRL's DPOTrainer.

    python dpo.py runs/chat pairs.jsonl --out models/preferred
    mobilellm chat models/preferred

A line of pairs.jsonl says what was asked, and which of two answers is the better one:
    {"prompt": [{"role": "user", "content": "…"}],
     "chosen": [{"role": "assistant", "content": "…"}], "rejected": [{"role": "assistant", "content": "…"}]}

Needs mobilellm[finetune]. docs/finetuning.md explains it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import datasets
import peft
import transformers
import trl

import mobilellm
from mobilellm.atomic import check_destination
from mobilellm.hf import from_mobilellm, load_tokenizer, to_mobilellm
from mobilellm.model import checkpoint
from mobilellm.model.api import LoadedModel
from mobilellm.model_directory import not_a_model_directory
from mobilellm.train.lora import TARGETS


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", help="a chat model: directory, run, Hub id")
    parser.add_argument("pairs", type=Path, help="JSON lines: prompt, chosen, rejected")
    parser.add_argument("--out", type=Path, required=True, help="model directory to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a model directory")
    parser.add_argument("--beta", type=float, default=0.1, help="how much moving away from the model costs")
    parser.add_argument("--rank", type=int, default=16, help="of LoRA; 0 trains the whole model")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="about 1e-6 with --rank 0")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=8, help="pairs a step")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    check_destination(arguments.out, arguments.overwrite, not_a_model_directory)
    loaded = mobilellm.load(arguments.model, dtype="float32")
    if loaded.tokenizer is None or loaded.chat_template is None:
        sys.exit(
            f"{arguments.model}: has no chat template; make a chat model of it first (mobilellm finetune)"
        )
    margins = tune(loaded, arguments.pairs, arguments)
    checkpoint.save(
        arguments.out, loaded.model, loaded.tokenizer, overwrite=arguments.overwrite,
        chat_template=loaded.chat_template,
    )  # fmt: skip
    print(json.dumps({"out": str(arguments.out), "margin_first": margins[0], "margin_last": margins[-1]}))


def tune(loaded: LoadedModel, pairs: Path, arguments: argparse.Namespace) -> list[float]:
    """Train the weights of `loaded`, in place; the margin of every step: how much further than at the start
    the chosen answer is above the rejected one, in units of beta nats."""
    face = from_mobilellm(loaded.model)  # the very same weights
    lora = None
    if arguments.rank:  # then the reference is the model with its adapters off: nothing is held twice
        lora = peft.LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules=list(TARGETS),
            task_type="CAUSAL_LM",
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = trl.DPOTrainer(
            face,
            ref_model=None if lora else twin(face),
            args=trl.DPOConfig(
                folder,
                beta=arguments.beta,
                learning_rate=arguments.learning_rate,
                num_train_epochs=arguments.epochs,
                per_device_train_batch_size=arguments.batch,
                max_length=loaded.model.config.max_position_embeddings,
                lr_scheduler_type="linear",
                warmup_steps=0.1,  # of all steps
                gradient_checkpointing=False,
                bf16=False,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                seed=arguments.seed,
            ),
            train_dataset=datasets.load_dataset("json", data_files=str(pairs), split="train"),
            processing_class=tokenizer_of(loaded),
            peft_config=lora,
        )
        trainer.train()
    trained = trainer.accelerator.unwrap_model(trainer.model)
    plain = to_mobilellm(trained.merge_and_unload() if lora else trained)
    loaded.model.load_state_dict(plain.state_dict())
    log: list[dict[str, Any]] = trainer.state.log_history
    return [entry["rewards/margins"] for entry in log if "rewards/margins" in entry]


def twin(face: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """A second model with the same weights, to compare with."""
    other = type(face)(face.config)
    other.load_state_dict(face.state_dict())
    return other.eval()


def tokenizer_of(loaded: LoadedModel) -> transformers.PreTrainedTokenizerFast:
    """As transformers has it, with the chat template; what fills up a batch is <unk>, never </s>."""
    assert loaded.tokenizer is not None
    with tempfile.TemporaryDirectory() as folder:
        loaded.tokenizer.save(folder)
        tokenizer = load_tokenizer(folder, chat_template=loaded.chat_template)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    return tokenizer


if __name__ == "__main__":
    main()
