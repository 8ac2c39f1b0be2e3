"""A request as the runtime takes it: prompts as tokens, sampling, limits. What cannot be done is refused."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mobilellm.chat_template import ChatTemplate
from mobilellm.runtime.session import RuntimeModel
from mobilellm.sampling import Sampling
from mobilellm.serve.answering import Choice
from mobilellm.serve.drawing import Drawing
from mobilellm.serve.errors import ApiError
from mobilellm.serve.grammar import Grammars, Matchers
from mobilellm.serve.protocol import ChatRequest, CompletionRequest, Request
from mobilellm.serve.settings import Limits

_COMPLETION_TOKENS = 16
"""Of /v1/completions where max_tokens is left out, as OpenAI has it; a chat's answer ends by itself."""
_SEEDS = 2**64


@dataclass(frozen=True)
class Prepared:
    """What one request comes to."""

    id: str
    created: int
    """Unix seconds."""
    stream: bool
    include_usage: bool
    choices: list[Choice]
    echoed: list[str]
    """Of a completion, what each choice's text begins with: its prompt, or nothing."""
    with_tools: bool = False


class Preparer:
    """Knows the model and the operator's limits. Its methods may be called from any thread."""

    def __init__(self, model: RuntimeModel, limits: Limits) -> None:
        self.model, self.limits = model, limits
        path = Path(os.path.abspath(model.source))  # "." and ".." have a name, too
        self.name = path.stem if path.suffix == ".gguf" else path.name
        self.context = model.engine.config.max_position_embeddings

    def get_ready(self) -> None:
        """Do once what the first request would wait for. Raises ValueError for a template that is none."""
        _ = self._grammars
        if self.model.chat_template is not None:
            _ = self._template

    @cached_property
    def _template(self) -> ChatTemplate:
        if self.model.chat_template is None:
            raise ApiError(
                400,
                f"{self.name} is a base model without a chat template: it goes on from a text and does not "
                "answer messages; use /v1/completions",
                "no_chat_template",
            )
        return ChatTemplate(self.model.chat_template, self.model.tokenizer)

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.model.tokenizer)

    def chat(self, request: ChatRequest) -> Prepared:
        self._check_model(request)
        template = self._template
        tools = [tool.model_dump(exclude_none=True) for tool in request.tools or []]
        if request.tool_choice not in (None, "auto", "none") and not tools:
            raise ApiError(400, "tool_choice: there are no tools to choose from", None, "tool_choice")
        if request.tool_choice == "none":
            tools = []
        try:
            tokens = template.prompt([_message(each) for each in request.messages], tools or None)
        except ValueError as error:
            raise ApiError(400, str(error), None, "messages") from None
        if request.top_logprobs is not None and not request.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs to be true", None, "top_logprobs")
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        most = request.max_completion_tokens or request.max_tokens
        matchers = self._grammars.of_chat(request, tools)
        choices = [
            self._choice(request, tokens, number, most, logprobs, matchers)
            for number in range(request.n or 1)
        ]
        return self._prepared("chatcmpl", request, choices, [], bool(tools))

    def completion(self, request: CompletionRequest) -> Prepared:
        self._check_model(request)
        if request.echo and request.logprobs is not None:
            raise ApiError(400, "echo: logprobs of the prompt are not computed; leave one out", None, "echo")
        prompts = _prompts(request.prompt)
        choices, texts = [], []
        for prompt in prompts:
            tokens = self._tokens(prompt)
            text = prompt if isinstance(prompt, str) else self.model.tokenizer.decode(tokens)
            for number in range(request.n or 1):
                texts.append(text if request.echo else "")
                most = request.max_tokens or _COMPLETION_TOKENS
                choices.append(self._choice(request, tokens, number, most, request.logprobs, None))
        return self._prepared("cmpl", request, choices, texts)

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            try:
                return self.model.tokenizer.encode(prompt)
            except ValueError as error:
                raise ApiError(400, f"prompt: {error}", None, "prompt") from None
        vocabulary = self.model.tokenizer.vocab_size
        if not prompt or not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ApiError(
                400, f"prompt: token ids must be in 0 … {vocabulary - 1}, at least one", None, "prompt"
            )
        return prompt

    def _choice(
        self,
        request: Request,
        tokens: Sequence[int],
        number: int,
        most: int | None,
        logprobs: int | None,
        matchers: Matchers | None,
    ) -> Choice:
        stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
        limit = self._limit(tokens, most)
        grammar = None if matchers is None else matchers.begin(limit)
        drawing = Drawing(
            logprobs, grammar, self._bias(request), request.presence_penalty or 0.0,
            request.frequency_penalty or 0.0,
        )  # fmt: skip
        return Choice(tokens, _sampling(request, number), limit, stop, drawing)

    def _limit(self, prompt: Sequence[int], most: int | None) -> int:
        limits = self.limits
        most_prompt = min(limits.max_prompt_tokens or self.context, self.context - 1)
        if len(prompt) > most_prompt:
            raise ApiError(
                400,
                f"the prompt has {len(prompt)} tokens; {most_prompt} is the most here, of a context of "
                f"{self.context}",
                "context_length_exceeded",
            )
        if limits.max_new_tokens is not None and (most or 0) > limits.max_new_tokens:
            raise ApiError(
                400, f"max_tokens: {most} were asked for; {limits.max_new_tokens} is the most here", None,
                "max_tokens",
            )  # fmt: skip
        return min(most or self.context, limits.max_new_tokens or self.context, self.context - len(prompt))

    def _bias(self, request: Request) -> dict[int, float]:
        vocabulary = self.model.tokenizer.vocab_size
        bias = {}
        for token, value in (request.logit_bias or {}).items():
            if not (token.isdecimal() and token.isascii() and len(token) < 10 and int(token) < vocabulary):
                raise ApiError(
                    400, f"logit_bias: {token[:20]!r} is no token id of 0 … {vocabulary - 1}", None,
                    "logit_bias",
                )  # fmt: skip
            bias[int(token)] = value
        return bias

    def _check_model(self, request: Request) -> None:
        if request.model is not None and request.model != self.name:
            raise ApiError(
                404,
                f"model {request.model[:100]!r} is not here; {self.name!r} is",
                "model_not_found",
                "model",
            )

    def _prepared(
        self,
        kind: str,
        request: Request,
        choices: list[Choice],
        echoed: list[str],
        with_tools: bool = False,
    ) -> Prepared:
        if request.stream_options is not None and not request.stream:
            raise ApiError(400, "stream_options: goes with stream = true only", None, "stream_options")
        usage = bool(request.stream_options and request.stream_options.include_usage)
        return Prepared(
            f"{kind}-{uuid.uuid4().hex}", int(time.time()), bool(request.stream), usage, choices, echoed,
            with_tools,
        )  # fmt: skip


def _prompts(prompt: str | Sequence[str | int | list[int]]) -> Sequence[str | list[int]]:
    if isinstance(prompt, str):
        return [prompt]
    ids = [each for each in prompt if isinstance(each, int)]
    return [ids] if ids else [each for each in prompt if not isinstance(each, int)]


def _sampling(request: Request, number: int) -> Sampling:
    """OpenAI's defaults. Choice 0 of a seed is what the seed gives for n = 1; the others have their own."""
    seed = None if request.seed is None else request.seed % _SEEDS + number * _SEEDS
    return Sampling(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_k=request.top_k or 0,
        top_p=1.0 if request.top_p is None else request.top_p,
        min_p=request.min_p or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        seed=seed,
    )


def _message(message: Any) -> dict[str, Any]:
    """As a chat template has it: "developer" is OpenAI's newer name for "system"."""
    out: dict[str, Any] = message.model_dump(exclude_none=True)
    if out["role"] == "developer":
        out["role"] = "system"
    return out
