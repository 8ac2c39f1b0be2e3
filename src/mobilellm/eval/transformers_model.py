"""Any causal language model of transformers as a `LanguageModel`: OPT, Pythia, BLOOM, Falcon, ...

Texts are encoded as lm-evaluation-harness encodes them for its "hf" models, so that tasks see the same
tokens: with what the tokenizer adds by itself (Llama <s>, OPT </s>, most others nothing), and before a text
that stands alone the BOS, or the EOS of a tokenizer without one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mobilellm.completion import Completion
from mobilellm.eval.causal_network import CausalNetwork
from mobilellm.eval.greedy_text import GreedyDecoder
from mobilellm.eval.interface import Likelihood, ModelIdentity, Request
from mobilellm.eval.request_rows import Row, batches_of, check, rows_of
from mobilellm.eval.transformers_chat import TokenizerChat
from mobilellm.eval.transformers_loading import LoadedWhole, load_whole
from mobilellm.model.checkpoint import check_device, torch_dtype

_log = logging.getLogger("mobilellm")

_LOGITS_AT_ONCE = 2**25
"""Elements of the float32 logits held at a time: 128 MiB, whatever batch and vocabulary."""
_TOKENS_AT_ONCE = {"cpu": 512}
_TOKENS_AT_ONCE_ELSEWHERE = 16384
_CONTEXT_KEYS = (
    "max_position_embeddings", "n_positions", "n_ctx", "seq_length", "context_length", "max_seq_len",
)  # fmt: skip
_USUAL_CONTEXT = 2048


def transformers_model(
    source: str | Path,
    dtype: str | None = None,
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokens_at_once: int | None = None,
    say: Callable[[str], None] = _log.warning,
    name: str | None = None,
) -> TransformersModel:
    """Load a model directory or Hub id with the Auto classes of transformers.

    `dtype` and `device` are as in `mobilellm.load`, except that a CPU without instructions for a stored
    bfloat16 gets float32; `tokens_at_once` bounds a forward pass, padding included; `name` is what the
    identity calls the model (by default `source`). Raises ValueError or FileNotFoundError
    with one line for what cannot be loaded whole: transformers itself leaves a missing weight random, and
    makes up an empty tokenizer.
    """
    name = name or str(source)
    wanted = torch_dtype(dtype) if dtype else None
    check_device(device)
    if tokens_at_once is not None and tokens_at_once < 1:
        raise ValueError(f"tokens_at_once = {tokens_at_once} must be at least 1")
    loaded = load_whole(source, wanted, device, revision, trust_remote_code, name, say)
    return TransformersModel(loaded, name, device, tokens_at_once, say)


class TransformersModel:
    """A `LanguageModel`. `splits` in `network` tells whether the head is computed only where it is needed."""

    def __init__(
        self,
        loaded: LoadedWhole,
        name: str,
        device: str,
        tokens_at_once: int | None,
        say: Callable[[str], None],
    ) -> None:
        model, tokenizer = loaded.model, loaded.tokenizer
        self._model, self._tokenizer, self._name = model, tokenizer, name
        rows: int = model.get_input_embeddings().weight.shape[0]
        tokens = max(tokenizer.get_vocab().values()) + 1
        if tokens > rows:
            raise ValueError(
                f"{name}: the tokenizer has {tokens} tokens and the embedding {rows} rows; they do not "
                "belong together, use the model's own tokenizer"
            )
        self.network = CausalNetwork(model, name, rows)
        self._vocabulary = min(rows, self.network.vocabulary)
        self._context = _context(model.config, tokenizer, name, say)
        usual = _TOKENS_AT_ONCE.get(torch.device(device).type, _TOKENS_AT_ONCE_ELSEWHERE)
        self._tokens_at_once = tokens_at_once or usual
        if not self.network.splits:  # then the states are logits already
            self._tokens_at_once = min(self._tokens_at_once, _LOGITS_AT_ONCE // self.network.vocabulary + 1)
        self._decoder = GreedyDecoder(model, tokenizer, self._context, self._vocabulary)
        self._identity = ModelIdentity(
            name=name,
            backend="transformers",
            dtype=str(model.dtype).removeprefix("torch."),
            device=device,
            fingerprint=loaded.fingerprint,
            parameters=loaded.parameters,
            bytes=loaded.bytes,
            config=json.loads(model.config.to_json_string(use_diff=False)),
        )

    @property
    def identity(self) -> ModelIdentity:
        return self._identity

    @property
    def context(self) -> int:
        return self._context

    @property
    def bos(self) -> int:
        for token in (self._tokenizer.bos_token_id, self._tokenizer.eos_token_id):
            if token is not None:
                return int(token)
        raise ValueError(
            f"{self._name}: its tokenizer has neither BOS nor EOS, so nothing can stand before a text; "
            "name one in tokenizer_config.json"
        )

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """As the protocol says; a text that begins with the BOS spelled out gets no second one."""
        if not special:
            return self._encode(texts, special=False)
        spelled = self._spelled_bos()
        begun = [bool(spelled) and text.startswith(spelled) for text in texts]
        plain = iter(self._encode([text for text, has in zip(texts, begun, strict=True) if not has], True))
        bare = iter(self._encode([text for text, has in zip(texts, begun, strict=True) if has], False))
        return [next(bare if has else plain) for has in begun]

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        """Raises ValueError for a tokenizer that keeps no places.

        A token of whitespace that the tokenizer does not count to any token goes to the one after it.
        """
        if not self._tokenizer.is_fast:
            raise ValueError(
                f"{self._name}: its tokenizer ({type(self._tokenizer).__name__}) does not tell where in the "
                "text a token begins; save it as a tokenizer.json"
            )
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        places, end = list[int](), 0
        for begin, after in encoding["offset_mapping"]:
            places.append(min(begin, end))
            end = max(end, after)
        return list(encoding["input_ids"]), places

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        """Raises ValueError at once for a request that does not fit the model, and for answers of NaN."""
        check(requests, self.context, self._vocabulary)
        return self._answers(rows_of(requests))

    @property
    def chat_template(self) -> str | None:
        template = self._tokenizer.chat_template
        return template if isinstance(template, str) else None

    def chat_format(self, template: str) -> TokenizerChat:
        return TokenizerChat(self._tokenizer, template, self._name)

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        """As the protocol says; the end is the EOS, `max_tokens`, or a full context."""
        check([Request(tuple(prompt), (0,)) for prompt in prompts], self.context, self._vocabulary)
        return self._decoder.completions(prompts, stop, max_tokens)

    def _answers(self, rows: list[Row]) -> Iterator[tuple[int, Likelihood]]:
        for batch in batches_of(rows, self._tokens_at_once):
            yield from self._answers_of_batch(batch)

    @torch.no_grad()
    def _answers_of_batch(self, batch: list[Row]) -> list[tuple[int, Likelihood]]:
        """One forward pass. Every place that is asked for goes through the head once, however many ask."""
        width = len(batch[0].tokens)
        device = self._model.device
        ids = torch.tensor([row.tokens + (0,) * (width - len(row.tokens)) for row in batch], device=device)
        states = self.network.states(ids).flatten(0, 1)  # (B * T, width of a state)
        asked = [
            (number * width + question.start + i, token)
            for number, row in enumerate(batch)
            for question in row.questions
            for i, token in enumerate(question.continuation)
        ]
        places, targets = torch.tensor(asked, device=device).T
        values, best = self._values(states, places, targets)
        if values.isnan().any():
            raise ValueError(
                f"{self._name}: the likelihoods are not numbers in {self._identity.dtype}; "
                "load the model in bfloat16 or float32"
            )
        answers, start = [], 0
        for question in (question for row in batch for question in row.questions):
            end = start + len(question.continuation)
            # An answer is kept longer than its batch.
            answer = Likelihood(values[start:end].numpy().copy(), bool(best[start:end].all()))
            answers += [(number, answer) for number in question.numbers]
            start = end
        return answers

    def _values(self, states: Tensor, places: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Of each (place, target): its log-probability and whether it is the largest; on the CPU, (N,)."""
        distinct, inverse = torch.unique(places, return_inverse=True)
        values = torch.empty(len(places), dtype=torch.float32, device=states.device)
        best = torch.empty(len(places), dtype=torch.bool, device=states.device)
        at_once = max(1, _LOGITS_AT_ONCE // self.network.vocabulary)
        for start in range(0, len(distinct), at_once):
            logits = self.network.logits(states[distinct[start : start + at_once]])
            chosen = ((inverse >= start) & (inverse < start + at_once)).nonzero()[:, 0]
            rows, wanted = inverse[chosen] - start, targets[chosen]
            best[chosen] = logits.argmax(-1)[rows] == wanted
            values[chosen] = logits.log_softmax(-1)[rows, wanted]
        return values.cpu(), best.cpu()

    def _encode(self, texts: Sequence[str], special: bool) -> list[list[int]]:
        if not texts:
            return []
        ids = self._tokenizer(list(texts), add_special_tokens=special, verbose=False)["input_ids"]
        return [list(row) for row in ids]

    def _spelled_bos(self) -> str:
        tokenizer = self._tokenizer
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            return ""
        return str(tokenizer.decode(self.bos))


def _context(config: Any, tokenizer: Any, name: str, say: Callable[[str], None]) -> int:
    """The most tokens at once, under any of the names it goes by."""
    config = config.get_text_config()
    for key in _CONTEXT_KEYS:
        if isinstance(value := getattr(config, key, None), int) and value > 0:
            return value
    if isinstance(value := tokenizer.model_max_length, int) and 0 < value < 2**24:  # not "without limit"
        return value
    say(f"{name}: neither config.json nor the tokenizer tells the longest context; {_USUAL_CONTEXT} is taken")
    return _USUAL_CONTEXT
