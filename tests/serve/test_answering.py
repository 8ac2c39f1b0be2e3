"""What a request leaves behind when it has been answered: nothing, and at once."""

from __future__ import annotations

import asyncio
import gc
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mobilellm.runtime

CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
JSON_FORMAT = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}


@pytest.mark.parametrize(
    ("path", "body", "goes_away"),
    [
        ("/v1/chat/completions", CHAT, False),
        ("/v1/chat/completions", {**CHAT, "stream": True, "n": 2}, False),
        ("/v1/chat/completions", {**CHAT, "logprobs": True, "response_format": JSON_FORMAT}, False),
        ("/v1/completions", {"prompt": ["a", "b"], "echo": True, "stop": "x"}, False),
        ("/v1/completions", {"prompt": "a", "max_tokens": 500, "stream": True}, True),
        ("/v1/completions", {"prompt": "a", "unknown": 1}, False),
    ],
)
def test_nothing_is_left_of_a_request(
    chat_file: Path, path: str, body: dict[str, Any], goes_away: bool
) -> None:
    """Not even for the collector of garbage: until that comes, memory would grow."""
    for package in ("starlette", "uvicorn", "httptools", "pydantic", "llguidance", "prometheus_client"):
        pytest.importorskip(package, reason=f"needs {package} (extra serve)")
    from mobilellm.serve.access_log import AccessLog
    from mobilellm.serve.app import Service, application
    from mobilellm.serve.settings import Access, Limits

    service = Service(mobilellm.runtime.load(chat_file, threads=1), Limits(slots=2))
    app = application(service, Access(), AccessLog(None))

    async def several(count: int) -> None:
        for _ in range(count):
            await asyncio.wait_for(_ask(app, path, body, goes_away), 300)
            while service.answering.running:
                await asyncio.sleep(0.01)

    async def left(count: int) -> Counter[str]:
        await several(3)  # what is made once
        with _without_collector():
            before = _ours()
            await several(count)
            for _ in range(600):
                if not (remaining := _ours() - before):
                    break
                await asyncio.sleep(0.05)  # the batch's thread has a step to end
            return remaining

    try:
        assert asyncio.run(left(6)) == Counter()
    finally:
        service.answering.close()


async def _ask(app: Any, path: str, body: dict[str, Any], goes_away: bool) -> None:
    """As a server would: the client goes away after its first token, or stays to the end."""
    messages = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    gone = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body" and (goes_away or not message.get("more_body")):
            gone.set()

    scope = {
        "type": "http", "method": "POST", "path": path, "query_string": b"", "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"127.0.0.1"), (b"content-type", b"application/json")],
    }  # fmt: skip
    await app(scope, receive, send)
    assert gone.is_set()


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _ours() -> Counter[str]:
    kinds = (type(each) for each in gc.get_objects())
    return Counter(kind.__qualname__ for kind in kinds if str(kind.__module__).startswith("mobilellm."))
