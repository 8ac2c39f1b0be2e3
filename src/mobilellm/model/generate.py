"""Token-level generation with a cache: batches of prompts of any lengths, one new token a row and step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from mobilellm.completion import FinishReason, NewToken, check_prompts, room_for
from mobilellm.model.cache import KVCache
from mobilellm.model.fused import FusedWeights, fuse
from mobilellm.model.transformer import MobileLLM
from mobilellm.sampling import Sampler, Sampling
from mobilellm.tokenizer import EOS_ID, PAD_ID

PREFILL_CHUNK = 512
"""Prompt tokens per forward call: large enough for full matrix speed, small enough to bound memory."""

SHORT_PROMPT = 64
"""Laying the weights out for inference takes some ten tokens' time, and pays from the second token on. The
first token after a prompt no longer than this does not wait for it; the rule looks at nothing but the length,
so that the same prompt always gives the same text."""


def generate_tokens(
    model: MobileLLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | None = None,
    max_new_tokens: int | None = None,
    stop_ids: Collection[int] = (EOS_ID,),
    until: Callable[[int, int], bool] | None = None,
    vocabulary: int | None = None,
) -> Iterator[NewToken]:
    """Yield the new tokens of every prompt as they are drawn, row by row within a step.

    A row ends with a stop id ("eos"), when `until(row, token)` says so ("stop"), after `max_new_tokens`
    ("length"), or when the model's context is full ("context"). `vocabulary` is how many ids may be drawn,
    for a tokenizer smaller than the embedding. Raises ValueError at once for empty prompts, prompts that
    leave no room, and ids outside the vocabulary.
    """
    check_prompts(prompts, model.config.max_position_embeddings, model.config.vocab_size, max_new_tokens)
    return _generate(model, prompts, sampling or Sampling(), max_new_tokens, stop_ids, until, vocabulary)


@torch.inference_mode()  # as a decorator: a `with` inside a generator would leak into its consumer
def _generate(
    model: MobileLLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int | None,
    stop_ids: Collection[int],
    until: Callable[[int, int], bool] | None,
    vocabulary: int | None,
) -> Iterator[NewToken]:
    lengths = [len(prompt) for prompt in prompts]
    limits = [room_for(n, max_new_tokens, model.config.max_position_embeddings) for n in lengths]
    # All rows share the columns of the longest; the last token drawn is never fed back and needs none.
    capacity = max(lengths) + max(count for count, _ in limits) - 1
    cache = _new_cache(model, lengths, capacity)
    fused = _fused(model) if max(lengths) > SHORT_PROMPT else None
    logits = _prefill(model, cache, fused, prompts)
    samplers = [Sampler(sampling, prompt, row) for row, prompt in enumerate(prompts)]
    drawn = [0] * len(prompts)
    live = list(range(len(prompts)))
    while live:
        fed = [PAD_ID] * len(prompts)  # finished rows are fed padding and ignored
        rows = logits[:, :vocabulary].float().cpu().numpy()
        for row in tuple(live):
            token = fed[row] = samplers[row](rows[row])
            drawn[row] += 1
            finish: FinishReason | None = None
            if token in stop_ids:
                finish = "eos"
            elif until is not None and until(row, token):
                finish = "stop"
            elif drawn[row] == limits[row][0]:
                finish = limits[row][1]
            if finish:
                live.remove(row)
            yield NewToken(row, token, finish)
        if live:
            fused = fused or _fused(model)
            step = torch.tensor(fed, device=logits.device)[:, None]
            logits = model.logits(model.hidden(step, cache, fused=fused)[:, -1], fused)


def _new_cache(model: MobileLLM, lengths: Sequence[int], capacity: int) -> KVCache:
    padding = None
    if len(set(lengths)) > 1:
        padding = torch.tensor([max(lengths) - n for n in lengths], device=model.head_weight.device)
    return model.new_cache(len(lengths), capacity, padding)


def _prefill(
    model: MobileLLM,
    cache: KVCache,
    fused: FusedWeights | None,
    prompts: Sequence[Sequence[int]],
) -> Tensor:
    """Feed the left-padded prompts in chunks; logits (B, V) of the last position."""
    longest = max(map(len, prompts))
    padded = [[PAD_ID] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(padded, device=model.head_weight.device)
    for chunk in torch.split(tokens, PREFILL_CHUNK, dim=1):
        hidden = model.hidden(chunk, cache, fused=fused)
    return model.logits(hidden[:, -1], fused)


def _fused(model: MobileLLM) -> FusedWeights:
    """The inference layout, kept with the model as long as its weights do not change."""
    model.inference_layout = fuse(model, reuse=model.inference_layout)
    return model.inference_layout
