"""Tokens as OpenAI's objects: a whole answer, or chunk by chunk.

What stands around the text of a chunk is made once, so that a token costs one escape.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mobilellm.completion import FinishReason
from mobilellm.serve.answering import Answer, Arrival
from mobilellm.serve.drawing import TokenChances
from mobilellm.serve.prepared import Prepared
from mobilellm.serve.process import memory_bytes
from mobilellm.tokenizer import Tokenizer
from mobilellm.tool_calls import ToolCall, parse_tool_calls

Object = dict[str, Any]
_TEXT = "text stands here"


@dataclass
class Written:
    """What there is of one choice."""

    text: str = ""
    chances: list[TokenChances] = field(default_factory=list)
    finish: str | None = None


class Writer:
    """What both kinds of answer have in common. Made for one request; every Arrival is given to it once."""

    whole_object: str
    chunk_object: str

    def __init__(self, prepared: Prepared, answer: Answer, model: str, tokenizer: Tokenizer) -> None:
        self.prepared, self.answer = prepared, answer
        self.written = [Written() for _ in prepared.choices]
        self.tokenizer = tokenizer
        self._about = {"id": prepared.id, "created": prepared.created, "model": model}
        self._unfinished = len(prepared.choices)
        self._edges = [self._around_text(number) for number in range(len(prepared.choices))]

    @property
    def done(self) -> bool:
        return self._unfinished == 0

    def take(self, arrivals: Sequence[Arrival]) -> None:
        for arrival in arrivals:
            self._add(arrival)

    def whole(self) -> Object:
        """The answer, when all has been taken."""
        choices = [self.whole_choice(number, written) for number, written in enumerate(self.written)]
        return {**self._about, "object": self.whole_object, "choices": choices, **self._cost()}

    def beginning(self) -> bytes:
        """What is sent before the first token."""
        return b"".join(
            self._event([each]) for number in range(len(self.written)) for each in self.first(number)
        )

    def chunks(self, arrivals: Sequence[Arrival]) -> bytes:
        """What is sent of these: after the last one of all, also the end of the stream."""
        return b"".join(part for arrival in arrivals for part in self._chunks(arrival))

    def _chunks(self, arrival: Arrival) -> Iterator[bytes]:
        piece, number, chances = arrival.piece, arrival.choice, arrival.chances
        assert piece is not None
        offset = len(self.written[number].text)
        self._add(arrival)
        if (piece.text or chances) and not self.prepared.with_tools:
            if chances is None:
                head, tail = self._edges[number]
                yield b"".join((head, json.dumps(piece.text).encode(), tail))
            else:
                yield self._event([self.delta(number, piece.text, self.likelihoods([chances], offset))])
        if not piece.finish:
            return
        *before, last = self.end(number, self.written[number])
        yield from (self._event([each]) for each in before)
        yield self._event([last], with_cost=self.done and not self.prepared.include_usage)
        if self.done:
            if self.prepared.include_usage:
                yield self._event([], with_cost=True)
            yield b"data: [DONE]\n\n"

    def _add(self, arrival: Arrival) -> None:
        piece, written = arrival.piece, self.written[arrival.choice]
        assert piece is not None
        written.text += piece.text
        if arrival.chances is not None:
            written.chances.append(arrival.chances)
        if piece.finish:
            written.finish = _finish_reason(piece.finish)
            self._unfinished -= 1

    def _event(self, choices: list[Object], with_cost: bool = False) -> bytes:
        chunk = {**self._about, "object": self.chunk_object, "choices": choices}
        if with_cost:
            chunk |= self._cost()
        elif self.prepared.include_usage:
            chunk["usage"] = None
        return b"data: " + json.dumps(chunk, separators=(",", ":")).encode() + b"\n\n"

    def _around_text(self, number: int) -> tuple[bytes, bytes]:
        head, tail = self._event([self.delta(number, _TEXT, None)]).split(f'"{_TEXT}"'.encode())
        return head, tail

    def _cost(self) -> Object:
        """Usage; and rates while the prompt was read and tokens were written, without waiting for a slot."""
        prompt, written, times = self.answer.prompt_tokens, self.answer.completion_tokens, self.answer.times()
        return {
            "usage": {
                "prompt_tokens": prompt,
                "completion_tokens": written,
                "total_tokens": prompt + written,
                "prompt_tokens_details": {"cached_tokens": min(prompt, self.answer.reused_tokens)},
            },
            "timings": {
                "prompt_tokens_per_second": times.prompt_rate,
                "tokens_per_second": times.rate,
                "seconds_to_first_token": times.to_first_token,
                "memory_bytes": memory_bytes(),
            },
        }

    # What differs between the kinds

    def first(self, number: int) -> list[Object]:
        raise NotImplementedError

    def delta(self, number: int, text: str, likelihoods: Object | None) -> Object:
        raise NotImplementedError

    def end(self, number: int, written: Written) -> list[Object]:
        raise NotImplementedError

    def whole_choice(self, number: int, written: Written) -> Object:
        raise NotImplementedError

    def likelihoods(self, chances: Sequence[TokenChances], offset: int) -> Object:
        raise NotImplementedError


class ChatWriter(Writer):
    whole_object, chunk_object = "chat.completion", "chat.completion.chunk"

    def first(self, number: int) -> list[Object]:
        return [
            _chat_delta(number, {"role": "assistant", "content": None if self.prepared.with_tools else ""})
        ]

    def delta(self, number: int, text: str, likelihoods: Object | None) -> Object:
        return _chat_delta(number, {"content": text}, likelihoods)

    def end(self, number: int, written: Written) -> list[Object]:
        """Where there are tools, all of the answer: only now is it known what of it is a call."""
        deltas: list[Object] = []
        finish = written.finish
        if self.prepared.with_tools:
            content, calls = parse_tool_calls(written.text)
            likelihoods = self.likelihoods(written.chances, 0) if written.chances else None
            if content or likelihoods:
                deltas.append(_chat_delta(number, {"content": content}, likelihoods))
            if calls:
                listed = [{"index": index, **_call(call)} for index, call in enumerate(calls)]
                deltas.append(_chat_delta(number, {"tool_calls": listed}))
            finish = "tool_calls" if calls else finish
        return [*deltas, {**_chat_delta(number, {}), "finish_reason": finish}]

    def whole_choice(self, number: int, written: Written) -> Object:
        message: Object = {"role": "assistant", "content": written.text, "refusal": None}
        finish = written.finish
        if self.prepared.with_tools:
            content, calls = parse_tool_calls(written.text)
            message["content"] = content or (None if calls else "")
            if calls:
                message["tool_calls"] = [_call(call) for call in calls]
                finish = "tool_calls"
        likelihoods = self.likelihoods(written.chances, 0) if self._asked_for_chances(number) else None
        return {"index": number, "message": message, "logprobs": likelihoods, "finish_reason": finish}

    def likelihoods(self, chances: Sequence[TokenChances], offset: int) -> Object:
        def entry(token: int, logprob: float) -> Object:
            data = self.tokenizer.token_bytes(token)
            return {"token": data.decode(errors="replace"), "logprob": logprob, "bytes": list(data)}

        content = [
            {**entry(each.token, each.logprob), "top_logprobs": [entry(*pair) for pair in each.top]}
            for each in chances
        ]
        return {"content": content, "refusal": None}

    def _asked_for_chances(self, number: int) -> bool:
        return self.prepared.choices[number].drawing.tells_chances


class CompletionWriter(Writer):
    whole_object = chunk_object = "text_completion"

    def first(self, number: int) -> list[Object]:
        prompt = self.prepared.echoed[number]
        return [self.delta(number, prompt, None)] if prompt else []

    def delta(self, number: int, text: str, likelihoods: Object | None) -> Object:
        return {"index": number, "text": text, "logprobs": likelihoods, "finish_reason": None}

    def end(self, number: int, written: Written) -> list[Object]:
        return [{**self.delta(number, "", None), "finish_reason": written.finish}]

    def whole_choice(self, number: int, written: Written) -> Object:
        asked = self.prepared.choices[number].drawing.tells_chances
        text = self.prepared.echoed[number] + written.text
        likelihoods = self.likelihoods(written.chances, 0) if asked else None
        return {**self.delta(number, text, likelihoods), "finish_reason": written.finish}

    def likelihoods(self, chances: Sequence[TokenChances], offset: int) -> Object:
        def text(token: int) -> str:
            return self.tokenizer.token_bytes(token).decode(errors="replace")

        offsets = []
        for each in chances:
            offsets.append(offset)
            offset += len(text(each.token))
        return {
            "tokens": [text(each.token) for each in chances],
            "token_logprobs": [each.logprob for each in chances],
            "top_logprobs": [{text(token): logprob for token, logprob in each.top} for each in chances],
            "text_offset": offsets,
        }


def _chat_delta(number: int, delta: Object, likelihoods: Object | None = None) -> Object:
    return {"index": number, "delta": delta, "logprobs": likelihoods, "finish_reason": None}


def _call(call: ToolCall) -> Object:
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return {"id": f"call_{uuid.uuid4().hex[:24]}", "type": "function", "function": function}


def _finish_reason(finish: FinishReason) -> str:
    """OpenAI knows two ends of a text. One that was cancelled ran out of time, which is a length as well."""
    return "stop" if finish in ("eos", "stop") else "length"
