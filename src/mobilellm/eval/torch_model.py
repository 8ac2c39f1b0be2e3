"""Our PyTorch models as an evaluation sees them: many short questions about likelihood, answered fast.

What requests have in common is computed once (`prefix_tree`), trees of about one size run together, and only
the states that predict a continuation's token go through the head. On two cores of a server chip matrix
products are four fifths of the time (docs/log.md).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

import torch

from mobilellm.chat_template import ChatTemplate
from mobilellm.completion import Completion, NewToken, Until, continue_texts
from mobilellm.eval.interface import Likelihood, ModelIdentity, Request
from mobilellm.eval.prefix_tree import PrefixTree, grow
from mobilellm.eval.request_rows import check
from mobilellm.eval.tree_scoring import answers
from mobilellm.model.api import LoadedModel
from mobilellm.model.fused import fuse
from mobilellm.model.generate import generate_tokens
from mobilellm.model.products import has_bfloat16
from mobilellm.model.transformer import MobileLLM
from mobilellm.tokenizer import BOS_ID, Tokenizer

TOKENS_AT_ONCE = {"cpu": 1_024}
"""By the device's type; others take TOKENS_AT_ONCE_ELSEWHERE, which fill a GPU."""
TOKENS_AT_ONCE_ELSEWHERE = 16_384
PROMPTS_AT_ONCE = 16


def torch_model(loaded: LoadedModel, tokens_at_once: int | None = None) -> TorchModel:
    """`loaded` for evaluation. `tokens_at_once` bounds a forward pass; only a request alone may be longer.

    Raises FileNotFoundError without a tokenizer.
    """
    if loaded.tokenizer is None:
        raise FileNotFoundError(
            f"{loaded.source}: has no tokenizer.json or tokenizer.model, so it cannot read the texts of an "
            "evaluation; put one beside the weights"
        )
    if tokens_at_once is not None and tokens_at_once < 1:
        raise ValueError(f"tokens_at_once = {tokens_at_once} must be at least 1")
    device = loaded.model.head_weight.device.type
    at_once = tokens_at_once or TOKENS_AT_ONCE.get(device, TOKENS_AT_ONCE_ELSEWHERE)
    return TorchModel(loaded.model, loaded.tokenizer, loaded.source, at_once, loaded.chat_template)


class TorchModel:
    """A `LanguageModel`; made by `torch_model`. The weights must not change while it is used."""

    def __init__(
        self,
        model: MobileLLM,
        tokenizer: Tokenizer,
        name: str,
        tokens_at_once: int,
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer, self.tokens_at_once, self.chat_template = tokenizer, tokens_at_once, chat_template
        self._name, self._stored = name, model
        self._model = _for_arithmetic(model)

    @cached_property
    def identity(self) -> ModelIdentity:
        """The fingerprint is over the weights as they were loaded: in another dtype it is another one.

        Where a CPU has no instructions for the weights' dtype, products are in float32 and `dtype` says so.
        """
        stored = list(self._stored.parameters())
        dtype, arithmetic = (_name(model.head_weight.dtype) for model in (self._stored, self._model))
        size = sum(parameter.numel() * parameter.element_size() for parameter in stored)
        if (quantization := self._stored.quantization) is not None:
            dtype, size = f"{dtype} of {quantization.scheme}", quantization.bytes
        return ModelIdentity(
            name=self._name,
            backend="mobilellm",
            dtype=dtype if dtype.startswith(arithmetic) else f"{dtype} (computed in {arithmetic})",
            device=str(self._stored.head_weight.device),
            fingerprint=fingerprint(self._stored, self.tokenizer),
            parameters=sum(parameter.numel() for parameter in stored),
            bytes=size,
            config=self._stored.config.to_dict(),
        )

    @property
    def context(self) -> int:
        return self._model.config.max_position_embeddings

    @property
    def bos(self) -> int:
        return BOS_ID

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of each text, with BOS in front unless `special` is false."""
        return self.tokenizer.encode_batch(texts, bos=special)

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        return self.tokenizer.encode_with_starts(text)

    def chat_format(self, template: str) -> ChatTemplate:
        return ChatTemplate(template, self.tokenizer)

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        """(number of the request, its answer), the largest trees of requests first.

        `greedy` is by the highest logit, of equal ones the lowest id, as decoding picks. Raises ValueError at
        once for a request that is empty, too long, or holds ids outside the vocabulary.
        """
        check(requests, self.context, self._model.config.vocab_size)
        return self._log_likelihoods(requests)

    def _log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        model = self._model
        model.inference_layout = fused = fuse(model, reuse=model.inference_layout)
        most = min(self.tokens_at_once, self.context)
        trees = grow(requests, most, _pairs_a_token(model))
        for batch in _batches(trees, self.tokens_at_once):
            yield from answers(model, fused, batch, requests)

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        """What follows each prompt, up to a stop string, EOS, `max_tokens` or a full context."""
        for number, prompt in enumerate(prompts):
            if not 1 <= len(prompt) < self.context:
                raise ValueError(
                    f"prompt {number} has {len(prompt)} tokens; give 1 … {self.context - 1}, so that the "
                    f"model's context of {self.context} has room for an answer"
                )
        found = dict[int, Completion]()
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        for start in range(0, len(order), PROMPTS_AT_ONCE):
            numbers = order[start : start + PROMPTS_AT_ONCE]
            some = self._continue([prompts[number] for number in numbers], stop, max_tokens)
            found.update(zip(numbers, some, strict=True))
        return [found[number] for number in range(len(prompts))]

    def _continue(
        self, prompts: list[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        def tokens(prompts: Sequence[Sequence[int]], until: Until) -> Iterator[NewToken]:
            return generate_tokens(
                self._model,
                prompts,
                max_new_tokens=max_tokens,
                until=until,
                vocabulary=self.tokenizer.vocab_size,
            )

        return continue_texts(self.tokenizer, prompts, stop, tokens)


def fingerprint(model: MobileLLM, tokenizer: Tokenizer) -> str:
    """SHA-256 over configuration, scheme, tokenizer, and the name, dtype, shape and bytes of every weight."""
    digest = hashlib.sha256(model.config.to_json().encode())
    if model.quantization is not None:
        digest.update(repr(model.quantization).encode())
    digest.update(tokenizer.fingerprint.encode())
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"\n{name} {_name(weight.dtype)} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _for_arithmetic(model: MobileLLM) -> MobileLLM:
    """`model`, or a float32 copy where the CPU has no instructions for its dtype.

    Those products are then 8 times faster than torch's own, and exact (docs/log.md).
    """
    weight = model.head_weight
    if weight.device.type != "cpu" or weight.dtype.itemsize >= torch.float32.itemsize:
        return model
    if weight.dtype == torch.bfloat16 and has_bfloat16():
        return model
    return copy.deepcopy(model).float()


def _pairs_a_token(model: MobileLLM) -> float:
    """Pairs of attention that take as long as one token through a block's weights.

    By the count of multiplications, at half the speed of matrix products as measured on a CPU (docs/log.md),
    and half of that again because trees that share nothing attend causally. It hardly matters: between a
    half and twice this the eight tasks take within 1 % of the same time.
    """
    config = model.config
    weights = sum(weight.numel() for weight in model.model.layers[0].parameters())
    return weights / (2 * config.num_heads * config.head_dim) / 4


def _batches(trees: Iterable[PrefixTree], tokens_at_once: int) -> Iterator[list[PrefixTree]]:
    """Trees to run together, the largest first; those that need no mask apart.

    Smaller ones are padded. A batch ends where its padding would cost more than reading the weights once
    more, which takes as long as a few dozen tokens.
    """
    batch: list[PrefixTree] = []
    for tree in sorted(trees, key=lambda tree: (tree.is_chain, len(tree)), reverse=True):
        size = (len(batch) + 1) * len(batch[0]) if batch else 0
        padding = size - sum(map(len, batch)) - len(tree)
        if batch and (
            tree.is_chain != batch[0].is_chain or size > tokens_at_once or padding > tokens_at_once // 32
        ):
            yield batch
            batch = []
        batch.append(tree)
    if batch:
        yield batch


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
