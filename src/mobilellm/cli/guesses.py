"""Words that people type for a verb, from other programs or plain English, and the command that does it."""

from __future__ import annotations

_MEANT = {
    "--version": "version v",
    "chat MODEL": "run talk ask repl interactive",
    "generate MODEL PROMPT": "complete completion completions predict sample infer inference prompt",
    "serve MODEL": "api ui gui",
    "info MODEL": "show describe summary size params parameters count",
    "info": "list ls models presets",
    "train --help": "recipes",
    "train RECIPE --plan": "plan",
    "train RECIPE --data.train SHARDS --out RUN": "pretrain pretraining fit resume continue",
    "train distill-cpu --data.train SHARDS --distill.teacher MODEL --out RUN": "distill distil distillation",
    "train qat-cpu --model.init-from MODEL --data.train SHARDS --out RUN": "qat",
    "finetune MODEL --chat.train FILE": "sft instruct tune",
    "finetune MODEL --chat.train FILE --lora.rank 16": "lora dora peft",
    "merge ADAPTER --out DIR": "fuse",
    "tokenizer train TEXT --vocab-size 16384 --out DIR": "vocab vocabulary bpe",
    "prepare TEXT --tokenizer DIR --out SHARDS": "tokenize tokenise encode preprocess pack",
    "eval ppl MODEL --data FILE": "ppl perplexity evaluation score test",
    "eval zero-shot MODEL": "zero-shot zeroshot lm-eval lm_eval harness tasks",
    "eval compare A.json B.json": "compare diff",
    "eval table": "table tables",
    "convert ORG/NAME DIR --to mobilellm": "download pull fetch get import",
    "convert MODEL DIR --to llama --unroll": "hf llama unroll",
    "quantize MODEL DIR": "compress gptq int4 int8",
    "export MODEL FILE.gguf": "gguf ollama llama.cpp llamacpp",
    "export MODEL DIR --to onnx": "onnx",
    "export MODEL DIR --to executorch": "executorch pte",
    "report RUN": "plot plots log logs tensorboard curves",
    "bench decode MODEL": "speed time decode",
    "bench prefill MODEL": "prefill",
    "cost MODEL": "price estimate flops days",
}
"""Arguments of the command -> the words for it, none of them a verb."""


def command_for(word: str) -> str | None:
    """What to type in place of a word that is no verb; None where nobody can tell."""
    plain = word.casefold().lstrip("-")
    return next((f"mobilellm {what}" for what, words in _MEANT.items() if plain in words.split()), None)
