"""A LanguageModel as lm-eval sees one: texts in, log-likelihoods and greedy completions out.

Texts become tokens as lm-eval's Hugging Face backend makes them, so that any difference between the two lies
in the model's arithmetic. Equal requests go to the model once, and all requests of a run in one call, so that
the model can order them as it likes.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from mobilellm.eval.interface import LanguageModel, Likelihood, Request

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

Pair = tuple[str, str]
"""Context and continuation."""

_TEXTS_AT_ONCE = 1024
_MOST_NEW_TOKENS = 256
"""Where a task names no number: lm-eval's own."""


class Progress(NamedTuple):
    """How far the model is. A token counts once for every request it is in, however it is run."""

    requests: int
    all_requests: int
    tokens: int
    all_tokens: int
    seconds: float


class HarnessModel(LM):  # type: ignore[misc]
    """The adapter. `besides` are pairs to answer along with lm-eval's own, in the same call."""

    def __init__(
        self,
        model: LanguageModel,
        besides: Sequence[Pair] = (),
        progress: Callable[[Progress], None] | None = None,
    ) -> None:
        super().__init__()
        self._model, self._besides, self._progress = model, besides, progress
        self._stderr = sys.stderr  # lm-eval runs with a silent one, but the model and the progress may speak
        self.answers_besides: dict[Pair, float] = {}
        """Log-likelihoods of `besides`, after the first call of `loglikelihood`."""
        self.requests = 0
        """Put to the model; equal ones count once."""
        self.truncated = 0
        """Of lm-eval's requests, how many lost tokens on the left, being longer than the model's context."""
        self.seconds = 0.0
        """Wall time of encoding and scoring."""

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """(log-likelihood of the continuation, whether greedy decoding would give it) for each request."""
        asked: list[Pair] = [instance.args for instance in requests]
        with self._speaking():
            besides = [pair for pair in self._besides if pair not in self.answers_besides]
            encoded = encode_pairs(self._model, asked + besides)
            answers = self._answers([self._fitting(request) for request in encoded])
        both = [(answer.total, answer.greedy) for answer in answers]
        self.answers_besides.update(zip(besides, (total for total, _ in both[len(asked) :]), strict=True))
        return both[: len(asked)]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Log-likelihood of each text whole: windows of the model's context that share no predicted token.

        As in lm-eval: the first token stands on `bos`, each later window's first on the one token before it
        and as much before that as fits.
        """
        with self._speaking():
            texts = _encode(self._model, [instance.args[0] for instance in requests])
            windows, owners = [], []
            for number, tokens in enumerate(texts):
                for pair in get_rolling_token_windows(tokens, self._model.bos, self._model.context, 1):
                    context, continuation = make_disjoint_window(pair)
                    windows.append(Request(tuple(context), tuple(continuation)))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for owner, answer in zip(owners, self._answers(windows), strict=True):
                totals[owner] += answer.total
        return totals

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Greedy completions, each up to one of its stop texts. Raises ValueError for any other decoding."""
        groups = defaultdict[tuple[tuple[str, ...], int], list[int]](list)
        for number, instance in enumerate(requests):
            groups[_greedy_settings(instance.args[1])].append(number)
        completions = [""] * len(requests)
        with self._speaking():
            for (stop, max_tokens), numbers in groups.items():
                room = self._model.context - max_tokens
                if room < 1:
                    raise ValueError(
                        f"the task asks for {max_tokens} new tokens, and the model's context holds "
                        f"{self._model.context} in all: none are left for the prompt"
                    )
                prompts = _encode(self._model, [requests[number].args[0] for number in numbers])
                answers = self._model.greedy([prompt[-room:] for prompt in prompts], stop, max_tokens)
                self.requests += len(numbers)
                for number, answer in zip(numbers, answers, strict=True):
                    completions[number] = answer.text
        return completions

    def _fitting(self, request: Request) -> Request:
        """Cut on the left to the model's context, as lm-eval does; the continuation stays whole."""
        context, continuation = request
        if len(continuation) > self._model.context:
            raise ValueError(
                f"an answer of {len(continuation)} tokens is longer than the model's context of "
                f"{self._model.context}"
            )
        over = len(context) + len(continuation) - 1 - self._model.context
        if over <= 0:
            return request
        self.truncated += 1
        return Request(context[over:], continuation)

    def _answers(self, requests: Sequence[Request]) -> list[Likelihood]:
        """In the order of the requests; equal ones are asked once."""
        numbers: dict[Request, int] = {}
        places = [numbers.setdefault(request, len(numbers)) for request in requests]
        different = list(numbers)
        sizes = [len(request.context) + len(request.continuation) for request in different]
        answers = dict[int, Likelihood]()
        start, tokens, all_tokens = time.monotonic(), 0, sum(sizes)
        for number, answer in self._model.log_likelihoods(different) if different else ():
            answers[number] = answer
            tokens += sizes[number]
            if self._progress:
                seconds = time.monotonic() - start
                self._progress(Progress(len(answers), len(different), tokens, all_tokens, seconds))
        self.requests += len(different)
        return [answers[place] for place in places]

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        start = time.monotonic()
        try:
            with contextlib.redirect_stderr(self._stderr):
                yield
        finally:
            self.seconds += time.monotonic() - start


def encode_pairs(model: LanguageModel, pairs: Sequence[Pair]) -> list[Request]:
    """Tokens of each context and continuation, as lm-eval cuts them.

    Spaces at the end of a context belong to the continuation. The continuation's tokens are those of both
    texts together after as many as the context has alone. An empty context is the model's `bos`, except where
    the continuation begins with it already.
    Raises ValueError for a continuation without a token of its own.
    """
    moved = [_move_spaces(context, continuation) for context, continuation in pairs]
    same: dict[int, int] = {}  # one object for each id: else the full sets' tokens take 32 bytes apiece more

    def kept(ids: Sequence[int]) -> tuple[int, ...]:
        return tuple(same.setdefault(each, each) for each in ids)

    different = list(dict.fromkeys(context for context, _ in moved))
    contexts = {text: kept(ids) for text, ids in zip(different, _encode(model, different), strict=True)}
    alone = [number for number, (context, _) in enumerate(pairs) if not context]
    wholes = _encode(model, [context + continuation for context, continuation in moved])
    without_context = _encode(model, [pairs[number][1] for number in alone], special=False)
    requests = [
        Request(contexts[context] or (model.bos,), kept(whole[len(contexts[context]) :]))
        for (context, _), whole in zip(moved, wholes, strict=True)
    ]
    for number, ids in zip(alone, without_context, strict=True):
        begins = 1 if ids[:1] == [model.bos] else 0
        requests[number] = Request((model.bos,), tuple(ids[begins:]))
    for (context, continuation), request in zip(pairs, requests, strict=True):
        if not request.continuation:
            raise ValueError(f"the answer {continuation!r} adds no token to its context {context[-40:]!r}")
    return requests


def _move_spaces(context: str, continuation: str) -> Pair:
    stripped = context.rstrip()
    return stripped, context[len(stripped) :] + continuation


def _encode(model: LanguageModel, texts: Sequence[str], special: bool = True) -> Iterator[list[int]]:
    """Ids of each text; one that is written with a BOS at its beginning gets no second one."""
    bos = model.bos
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        some = texts[start : start + _TEXTS_AT_ONCE]
        ids = model.encode(some, special)
        if special:
            twice = [number for number, each in enumerate(ids) if each[:2] == [bos, bos]]
            again = model.encode([some[number] for number in twice], False) if twice else []
            for number, each in zip(twice, again, strict=True):
                ids[number] = each
        yield from ids


def _greedy_settings(settings: dict[str, Any]) -> tuple[tuple[str, ...], int]:
    """(stop texts, most new tokens) of a task's settings; ValueError for one that greedy decoding has not."""
    normal = dict(normalize_gen_kwargs(settings, _MOST_NEW_TOKENS))
    sampled, _ = normal.pop("do_sample"), normal.pop("temperature", None)
    stop, max_tokens = tuple(text for text in normal.pop("until") if text), normal.pop("max_gen_toks")
    others = [f"{name} = {value}" for name, value in normal.items() if name not in ("top_p", "top_k")]
    if sampled or others:
        what = ["do_sample = True"] if sampled else []
        raise ValueError(f"the task asks for {', '.join(what + others)}; only greedy decoding is offered")
    return stop, max_tokens
