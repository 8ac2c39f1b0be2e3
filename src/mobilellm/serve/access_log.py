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
    """Filled while a request is answered."""

    method: str
    path: str
    client: str | None
    began: float = field(default_factory=time.perf_counter)
    status: int = 0
    bytes: int = 0
    disconnected: bool = False
    about: dict[str, Any] = field(default_factory=dict)
    said: dict[str, Any] = field(default_factory=dict)

    def say(self, user: str | None, said: dict[str, Any]) -> None:
        """What was asked; `user` is a name that the client gives for whom it asks."""
        if user is not None:
            self.about["user"] = user
        self.said |= said

    def answered(self, answer: Answer, writer: Writer) -> None:
        times = answer.times()
        self.about |= {
            "id": writer.prepared.id,
            "stream": writer.prepared.stream,
            "prompt_tokens": answer.prompt_tokens,
            "cached_tokens": answer.reused_tokens,
            "completion_tokens": answer.completion_tokens,
            "first_token_ms": None if times.to_first_token is None else round(1000 * times.to_first_token, 1),
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
            "ms": round(1000 * (time.perf_counter() - record.began), 1),
            "disconnected": record.disconnected,
            **record.about,
            **(record.said if self._with_text else {}),
        }
        self._stream.write(json.dumps(line, separators=(",", ":")) + "\n")
        self._stream.flush()
