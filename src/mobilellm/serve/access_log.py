"""One JSON object a request, on a line of its own: who asked for what, what it cost, how it ended.

What was said is not in it, neither the prompt nor the answer, unless the operator asks for that.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, TextIO

from mobilellm.serve.answering import Answer
from mobilellm.serve.choices import Writer

_MOST_OF_A_PATH = 200


@dataclass
class Record:
    """What is known of one request; filled while it is answered."""

    method: str
    path: str
    client: str | None
    began: float = field(default_factory=time.perf_counter)
    seconds: float = 0.0
    route: str = "none"
    """The path as the server has it, without what a client may make up."""
    status: int = 0
    bytes: int = 0
    disconnected: bool = False
    user: str | None = None
    """Whom the client says that it asks for."""
    said: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    first_token: float | None = None

    def answered(self, answer: Answer, writer: Writer) -> None:
        times = answer.times()
        self.first_token = times.to_first_token
        self.tokens = {
            "prompt": answer.prompt_tokens,
            "cached": answer.reused_tokens,
            "completion": answer.completion_tokens,
        }
        self.answer = {
            "id": writer.prepared.id,
            "stream": writer.prepared.stream,
            **{f"{kind}_tokens": count for kind, count in self.tokens.items()},
            "first_token_ms": _milliseconds(times.to_first_token),
            "tokens_per_second": None if times.rate is None else round(times.rate, 1),
            "finish": [written.finish for written in writer.written],
        }
        self.said["texts"] = [written.text for written in writer.written]


class AccessLog:
    def __init__(self, stream: TextIO | None, with_text: bool = False) -> None:
        """`stream` None writes nothing; `with_text` adds what was said."""
        self._stream, self._with_text = stream, with_text

    def write(self, record: Record) -> None:
        if self._stream is None:
            return
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "client": record.client,
            "method": record.method,
            "path": record.path[:_MOST_OF_A_PATH],
            "status": record.status,
            "bytes": record.bytes,
            "ms": _milliseconds(record.seconds),
            "disconnected": record.disconnected,
            **({} if record.user is None else {"user": record.user}),
            **record.answer,
            **(record.said if self._with_text else {}),
        }
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._stream.flush()


def _milliseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1000 * seconds, 1)
