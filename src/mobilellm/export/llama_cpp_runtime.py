"""A .gguf file in llama.cpp, by its Python bindings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.chat_template import Message
from mobilellm.export.questions import Floats
from mobilellm.installation import install_command, missing_packages


class LlamaCpp:
    """See `Runtime`."""

    def __init__(self, model: Any) -> None:
        import llama_cpp

        self._model, self._library = model, llama_cpp
        self.name = f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [self._model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]

    def chat(self, messages: Sequence[Message]) -> list[int] | None:
        """As its create_chat_completion does it."""
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self._model.metadata.get("tokenizer.chat_template")
        if template is None:
            return None
        vocabulary = self._library.llama_model_get_vocab(self._model.model)
        bos, eos = (
            self._library.llama_vocab_get_text(vocabulary, token).decode()
            for token in (self._model.token_bos(), self._model.token_eos())
        )
        formatter = Jinja2ChatFormatter(template=template, eos_token=eos, bos_token=bos)
        text = formatter(messages=[dict(message) for message in messages]).prompt
        return list(self._model.tokenize(text.encode(), add_bos=False, special=True))

    def logits(self, tokens: Sequence[int]) -> Floats:
        return self._fed(tokens, len(tokens))

    def steps(self, tokens: Sequence[int]) -> Floats:
        return self._fed(tokens, 1)

    def greedy(self, prompt: Sequence[int], most: int, forced: tuple[int, int] | None = None) -> list[int]:
        """Ends where llama.cpp counts a token among those that end a text."""
        library, start = self._library, len(prompt)

        def wanting(ids: Any, scores: Any) -> Any:
            if forced is not None and len(ids) == start + forced[0]:
                scores[forced[1]] = scores.max() + 1
            return scores

        vocabulary = library.llama_model_get_vocab(self._model.model)
        self._model.reset()
        new: list[int] = []
        for token in self._model.generate(
            list(prompt),
            temp=0.0,
            repeat_penalty=1.0,
            logits_processor=library.LogitsProcessorList([wanting]),
        ):
            new.append(token)
            if len(new) == most or library.llama_vocab_is_eog(vocabulary, token):
                break
        return new

    def _fed(self, tokens: Sequence[int], at_once: int) -> Floats:
        self._model.reset()
        for start in range(0, len(tokens), at_once):
            self._model.eval(list(tokens[start : start + at_once]))
        logits: Floats = np.array(self._model.scores[: len(tokens)], np.float32)
        return logits


@contextmanager
def llama_cpp_runtime(path: Path) -> Iterator[LlamaCpp]:
    """Raises ValueError for a file that llama.cpp does not load, ImportError where it is not installed."""
    if missing_packages("llama_cpp"):
        raise ImportError(
            f"runtime llama.cpp needs the package llama-cpp-python; install with: {install_command('peers')}",
            name="llama_cpp",
        )
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=0, logits_all=True, verbose=False)
    try:
        yield LlamaCpp(model)
    finally:
        model.close()
