"""A directory in onnxruntime-genai: its tokenizer, its cache, its loop."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.chat_template import Message
from mobilellm.export.questions import Floats
from mobilellm.installation import install_command, missing_packages
from mobilellm.sentencepiece_model import SPECIAL_PIECES
from mobilellm.tokenizer import Tokenizer


class GenaiRuntime:
    """See `Runtime`."""

    def __init__(self, directory: Path) -> None:
        import onnxruntime_genai

        self._genai: Any = onnxruntime_genai
        self._model = self._genai.Model(str(directory))
        self._tokenizer = self._genai.Tokenizer(self._model)
        self._tokenizer.update_options(add_special_tokens="true")  # else it leaves out BOS
        self._ours = Tokenizer.load(directory)
        self.name = f"onnxruntime-genai {self._genai.__version__}"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """What it cannot be asked is read by this package: a typed "</s>" is the special token to it, and a
        text ends for it at a NUL."""
        return [
            self._ours.encode(text)
            if any(piece in text for piece in (*SPECIAL_PIECES, "\0"))
            else [int(token) for token in self._tokenizer.encode(text)]
            for text in texts
        ]

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        """As its examples have it: the template puts BOS in front, and encoding must not do so again."""
        try:
            text = self._tokenizer.apply_chat_template(json.dumps(list(messages)), add_generation_prompt=True)
        except Exception:  # of a class of its own
            return None
        self._tokenizer.update_options(add_special_tokens="false")
        try:
            return [int(token) for token in self._tokenizer.encode(text)]
        finally:
            self._tokenizer.update_options(add_special_tokens="true")

    def logits(self, tokens: Sequence[int]) -> Floats:
        return self._fed(self._generator(len(tokens)), tokens)

    def steps(self, tokens: Sequence[int]) -> Floats:
        generator = self._generator(len(tokens))
        return np.concatenate([self._fed(generator, [token]) for token in tokens])

    def greedy(self, prompt: Sequence[int], most: int, forced: tuple[int, int] | None = None) -> list[int]:
        generator = self._generator(len(prompt) + most)
        generator.append_tokens(np.array(prompt, np.int32))
        new = list[int]()
        while len(new) < most and not generator.is_done():
            if forced is not None and len(new) == forced[0]:
                logits = np.array(generator.get_logits())
                logits[..., forced[1]] = logits.max() + 1
                generator.set_logits(logits)
            generator.generate_next_token()
            new.append(int(generator.get_next_tokens()[0]))
        return new

    def _generator(self, length: int) -> Any:
        settings = self._genai.GeneratorParams(self._model)
        settings.set_search_options(max_length=length, do_sample=False)
        return self._genai.Generator(self._model, settings)

    def _fed(self, generator: Any, tokens: Sequence[int]) -> Floats:
        generator.append_tokens(np.array(tokens, np.int32))
        logits: Floats = np.array(generator.get_output("logits")[0], np.float32)
        return logits


@contextmanager
def genai_runtime(path: Path) -> Iterator[GenaiRuntime]:
    """Raises ImportError without the package, ValueError with what it said of a directory it cannot load."""
    if missing_packages("onnxruntime_genai"):
        raise ImportError(
            f"onnxruntime-genai is not installed; install it with: {install_command('onnx')}, "
            "or compare with --runtime onnxruntime",
            name="onnxruntime_genai",
        )
    try:
        runtime = GenaiRuntime(path)
    except Exception as error:  # of classes of its own
        raise ValueError(f"{path}: onnxruntime-genai cannot load it: {str(error).splitlines()[0]}") from None
    yield runtime
