"""Bits per byte of a model on plain text files: every token predicted once, in windows of the context.

    python benchmarks/bits_per_byte.py runs/cpu-hour wiki.test.raw other.txt

A file is one document. Bits per byte is comparable between tokenizers; perplexity per token is not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mobilellm
from mobilellm.eval.perplexity import windowed


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--window", type=int, help="tokens; by default the model's context")
    arguments = parser.parse_args()
    loaded = mobilellm.load(arguments.model)
    assert loaded.tokenizer is not None, f"{arguments.model} has no tokenizer"
    window = arguments.window or loaded.model.config.max_position_embeddings
    for file in arguments.files:
        text = file.read_text(encoding="utf-8")
        result = windowed(loaded.model, loaded.tokenizer.encode(text, eos=True), window)
        numbers = {
            "file": file.name,
            "bytes": len(text.encode()),
            "tokens": result.tokens,
            "window": window,
            "perplexity_per_token": round(result.perplexity, 3),
            "bits_per_byte": round(result.bits_per_byte(len(text.encode())), 4),
        }
        print(json.dumps(numbers))


if __name__ == "__main__":
    main()
