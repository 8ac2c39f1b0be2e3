"""`mobilellm.load` and `mobilellm.generate`: a model and its tokenizer, text in and text out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mobilellm import hub
from mobilellm.chat_template import stored_template
from mobilellm.completion import Completion, NewToken, Piece, Until, completions, stream_text
from mobilellm.config import ModelConfig
from mobilellm.model import checkpoint
from mobilellm.model.generate import generate_tokens
from mobilellm.model.transformer import MobileLLM
from mobilellm.model_directory import is_adapter
from mobilellm.sampling import Sampling
from mobilellm.tokenizer import Tokenizer

_log = logging.getLogger("mobilellm")


@dataclass(frozen=True)
class LoadedModel:
    """A model, its tokenizer, where they came from, and what had to be repaired on the way."""

    model: MobileLLM
    tokenizer: Tokenizer | None
    """None of a directory without one: such a model takes ids alone."""
    source: str
    """What was asked for."""
    repairs: tuple[str, ...] = ()
    """A sentence each."""
    chat_template: str | None = None
    """Of a model to talk to: for `mobilellm.chat_template.ChatTemplate`. None of a base model."""

    def stream(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Piece]:
        """Generate for one prompt or several at once and yield every token's text, never half a character.

        Greedy unless told otherwise. A text ends with EOS, before one of the strings in `stop`, after
        `max_new_tokens`, or where the model's context is full. Raises at once ValueError for a prompt that
        does not fit the context, FileNotFoundError without a tokenizer.
        """
        if self.tokenizer is None:
            raise FileNotFoundError(
                f"{self.source}: has no tokenizer.json or tokenizer.model, so it cannot read text; "
                "put one beside the weights"
            )
        vocabulary = self.tokenizer.vocab_size

        def tokens(encoded: list[list[int]], until: Until) -> Iterator[NewToken]:
            return generate_tokens(
                self.model, encoded, sampling, max_new_tokens, until=until, vocabulary=vocabulary
            )

        return stream_text(self.tokenizer, prompts, stop, tokens)


def load(
    source: str | Path,
    dtype: str | None = None,
    device: str = "cpu",
    revision: str | None = None,
    say: Callable[[str], None] = _log.warning,
) -> LoadedModel:
    """Load a model directory, a training run, or a Hub id, in any official layout; or an adapter, merged.

    Every repair of a known fault is kept in `.repairs` and told to `say` (by default the "mobilellm" logger);
    anything else that is wrong is refused: FileNotFoundError or ValueError, one line that names the file and
    the fault. `dtype` is "float32", "bfloat16", "float16", or None for the stored one (float16 becomes
    float32 on a CPU). `device` is torch's name for it; `revision` a branch, tag or commit on the Hub.
    """
    wanted = checkpoint.torch_dtype(dtype) if dtype else None
    checkpoint.check_device(device)
    directory = hub.resolve(source, say, revision)
    if is_adapter(directory):
        return _load_adapter(directory, source, wanted, device, say)
    weights = checkpoint.read_weights(directory)
    tokenizer = read_tokenizer(directory, weights.config)
    repairs = weights.repairs + (tokenizer.repairs if tokenizer else ())
    for repair in repairs:
        say(f"{source}: repaired: {repair}")
    model = checkpoint.build(weights, wanted, device)
    return LoadedModel(model, tokenizer, str(source), repairs, stored_template(directory))


def _load_adapter(
    directory: Path,
    source: str | Path,
    dtype: torch.dtype | None,
    device: str,
    say: Callable[[str], None],
) -> LoadedModel:
    from mobilellm.model.adapter_files import merge_adapter

    merged = merge_adapter(directory, None, say)
    for repair in merged.repairs:
        say(f"{source}: repaired: {repair}")
    model = merged.model.to(device=device, dtype=dtype)
    return LoadedModel(model, merged.tokenizer, str(source), merged.repairs, merged.chat_template)


def generate(
    model: LoadedModel | str | Path,
    prompts: str | Sequence[str],
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
) -> list[Completion]:
    """Complete one prompt or a batch; always a list, one Completion a prompt. Greedy unless told otherwise.

    `model` is what `load` returned, or what it takes; the rest is as in `LoadedModel.stream`, which gives the
    text as it is generated. Raises what `load` and `stream` raise.
    """
    loaded = model if isinstance(model, LoadedModel) else load(model)
    count = 1 if isinstance(prompts, str) else len(prompts)
    return completions(loaded.stream(prompts, sampling, max_new_tokens, stop), count)


def read_tokenizer(directory: Path, config: ModelConfig) -> Tokenizer | None:
    """The tokenizer of a model directory, checked against the embedding; None if there is none."""
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    tokenizer = Tokenizer.load(directory)
    checkpoint.check_fit(tokenizer, config, str(directory))
    return tokenizer
