"""What answers in a chat: a model with a session, which computes only what is new in a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from mobilellm.artefacts.text_model import open_text_model
from mobilellm.completion import NewToken, Until
from mobilellm.runtime.decoding import Decoding
from mobilellm.runtime.generation import Engine
from mobilellm.runtime.kv_cache import KVCacheType
from mobilellm.runtime.session import RuntimeModel
from mobilellm.sampling import Sampling
from mobilellm.tokenizer import Tokenizer


class Speaker(Protocol):
    source: str
    """What the user typed."""
    runs_in: str
    """The program that computes, in words."""
    tokenizer: Tokenizer
    chat_template: str | None
    """None for a base model."""
    context: int
    """Most tokens of prompt and answer together."""

    @property
    def reused(self) -> int:
        """Tokens of the last prompt that did not have to be computed again."""

    def tokens(
        self, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int | None, until: Until
    ) -> Iterator[NewToken]:
        """The new tokens as they are drawn, to EOS, `until`, the most there may be, or the context's end.

        Raises ValueError at once for a prompt that leaves no room.
        """


def open_speaker(
    source: str, threads: int | None, say: Callable[[str], None], kv_cache: KVCacheType = "f16"
) -> ModelSpeaker:
    """Whatever `source` names. Raises ValueError, FileNotFoundError or ImportError with one line."""
    return ModelSpeaker(open_text_model(source, threads, say, kv_cache))


class ModelSpeaker:
    """See `Speaker`."""

    def __init__(self, model: RuntimeModel) -> None:
        self.source, self.tokenizer, self.chat_template = model.source, model.tokenizer, model.chat_template
        self.context = model.engine.config.max_position_embeddings
        self.runs_in = _runs_in(model.engine)
        self._session = model.session()

    @property
    def reused(self) -> int:
        return self._session.usage.reused if self._session.usage else 0

    def tokens(
        self, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int | None, until: Until
    ) -> Iterator[NewToken]:
        return self._session.generate_tokens(
            prompt, sampling, max_new_tokens, until, Decoding(context="stop")
        )


def _runs_in(engine: Engine) -> str:
    isa, threads = getattr(engine, "isa", None), getattr(engine, "threads", 1)
    if isa is not None:
        where = f"compiled engine, {isa}, {threads} {'thread' if threads == 1 else 'threads'}"
    else:
        where = {"torch": "PyTorch"}.get(backend := str(getattr(engine, "backend", "numpy")), backend)
    return where + (", cache in q8_0" if getattr(engine, "kv_cache", "f16") == "q8_0" else "")
