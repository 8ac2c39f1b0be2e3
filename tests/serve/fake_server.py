"""A server with the paths of `mobilellm serve` that says what a test wants it to say, as it wants it said."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "src" / "mobilellm" / "serve" / "page"


@dataclass
class Script:
    """What the fake model is and does; a test changes it while the server runs."""

    is_chat: bool = True
    pieces: Sequence[str] = ("Hello", " there", ".")
    """The answer, as many chunks of a stream."""
    delay: float = 0.0
    """Seconds before each piece."""
    status: int = 200
    """Of completions; below 400 they are answered."""
    key: str | None = None
    cut_after: int | None = None
    """Pieces after which the connection is closed."""
    fail_after: int | None = None
    """Pieces after which the answer ends with an error, as of a server that is told to end."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    unread: int = 0
    """Answers whose reader went away."""


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, script: Script, *arguments: Any) -> None:
        self.script = script
        super().__init__(*arguments, directory=str(PAGE))

    def log_message(self, format: str, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        if self.path != "/v1/models":
            super().do_GET()
        elif self._may_ask():
            facts = {
                "is_chat": self.script.is_chat, "parameters": 124_635_456, "layers": 30, "context": 2048,
                "quantisation": "Q4_0", "file_bytes": 70_778_880, "threads": 2, "memory_bytes": 153_000_000,
            }  # fmt: skip
            self._json(200, {"object": "list", "data": [{"id": "fake-125m", "mobilellm": facts}]})

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may_ask():
            return
        self.script.requests.append(request)
        if self.script.status >= 400:
            error = {"message": "max_tokens: should be at least 1", "type": "invalid_request_error"}
            self._json(self.script.status, {"error": error})
        else:
            self._stream("messages" in request)

    def _may_ask(self) -> bool:
        if self.script.key is None or self.headers["Authorization"] == f"Bearer {self.script.key}":
            return True
        self._json(401, {"error": {"message": "the API key is missing or wrong"}})
        return False

    def _json(self, status: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if status == 429:
            self.send_header("Retry-After", "1")
        self.end_headers()
        self.wfile.write(body)

    def _stream(self, is_chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        pieces = list(self.script.pieces)
        try:
            for number, piece in enumerate(pieces):
                time.sleep(self.script.delay)
                if number == self.script.cut_after:
                    return
                if number == self.script.fail_after:
                    self._event({"error": {"message": "the server is shutting down"}})
                    return
                said = {"delta": {"content": piece}} if is_chat else {"text": piece}
                self._event({"choices": [{"index": 0, "finish_reason": None, **said}]})
            last = {"delta": {}} if is_chat else {"text": ""}
            usage = {"prompt_tokens": 10, "completion_tokens": len(pieces), "total_tokens": 10 + len(pieces)}
            self._event({"choices": [{"index": 0, "finish_reason": "stop", **last}]})
            timings = {"tokens_per_second": 234.5, "memory_bytes": 160_000_000}
            self._event({"choices": [], "usage": usage, "timings": timings})
            self.wfile.write(b"data: [DONE]\n\n")
        except (BrokenPipeError, ConnectionResetError):
            self.script.unread += 1
        finally:
            self.close_connection = True

    def _event(self, value: object) -> None:
        self.wfile.write(b"data: " + json.dumps(value).encode() + b"\n\n")
        self.wfile.flush()


@contextmanager
def fake_server(script: Script) -> Iterator[str]:
    """Its address, while it runs."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, script))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()
