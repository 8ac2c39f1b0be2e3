"""What answers in a chat: a .gguf file or a directory of another runtime with its session, or PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from mobilellm.artefacts.opening import open_runtime_model
from mobilellm.completion import NewToken, Until
from mobilellm.runtime.decoding import Decoding
from mobilellm.runtime.generation import Engine
from mobilellm.runtime.session import RuntimeModel
from mobilellm.sampling import Sampling
from mobilellm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mobilellm.model.api import LoadedModel


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
    source: str,
    threads: int | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> Speaker:
    """Whatever `source` names. Raises ValueError, FileNotFoundError or ImportError with one line.

    `threads` are of what runs without PyTorch, `dtype` and `device` of PyTorch; the other is refused.
    """
    runtime = open_runtime_model(source, threads, say)
    if runtime is not None:
        for name, value, default in (("dtype", dtype, None), ("device", device, "cpu")):
            if value != default:
                raise ValueError(
                    f"{name} = {value} does not go with {source}, which runs as it is stored; leave it out"
                )
        return RuntimeSpeaker(runtime)
    if threads is not None:
        raise ValueError(f"threads = {threads} is not for models in PyTorch; set OMP_NUM_THREADS")
    from mobilellm.model.api import load

    return TorchSpeaker(load(source, dtype, device, say=say))


class RuntimeSpeaker:
    """See `Speaker`. Of a conversation that grows only what is new is computed."""

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


class TorchSpeaker:
    """See `Speaker`. Reads the whole conversation again for every answer."""

    reused = 0

    def __init__(self, loaded: LoadedModel) -> None:
        """Raises FileNotFoundError for a model without a tokenizer."""
        if loaded.tokenizer is None:
            raise FileNotFoundError(
                f"{loaded.source}: has no tokenizer.json or tokenizer.model, so it cannot read text; "
                "put one beside the weights"
            )
        self.source, self.tokenizer, self.chat_template = (
            loaded.source,
            loaded.tokenizer,
            loaded.chat_template,
        )
        self.context = loaded.model.config.max_position_embeddings
        self.runs_in = "PyTorch"
        self._model = loaded.model

    def tokens(
        self, prompt: Sequence[int], sampling: Sampling, max_new_tokens: int | None, until: Until
    ) -> Iterator[NewToken]:
        from mobilellm.model.generate import generate_tokens

        vocabulary = self.tokenizer.vocab_size
        return generate_tokens(
            self._model, [prompt], sampling, max_new_tokens, until=until, vocabulary=vocabulary
        )


def _runs_in(engine: Engine) -> str:
    isa, threads = getattr(engine, "isa", None), getattr(engine, "threads", 1)
    if isa is not None:
        return f"compiled engine, {isa}, {threads} {'thread' if threads == 1 else 'threads'}"
    return str(getattr(engine, "backend", "numpy"))
