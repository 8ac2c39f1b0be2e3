"""A server in a process of its own, as a user starts it, over a small model of random weights."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mobilellm import gguf_model
from mobilellm.chat_template import DEFAULT
from mobilellm.config import ModelConfig
from mobilellm.gguf_blocks import TYPES
from mobilellm.gguf_model import Roles
from mobilellm.runtime.random_model import made_tokenizer, random_weights

httpx = pytest.importorskip("httpx2", reason="needs httpx2 (extra test)")
SHAPE = ModelConfig(
    vocab_size=600, hidden_size=64, intermediate_size=160, num_layers=3, num_heads=4, num_kv_heads=2,
    head_dim=16, max_position_embeddings=1024,
)  # fmt: skip
JSON = {"Content-Type": "application/json"}


def write_model(path: Path, is_chat: bool = True) -> Path:
    pytest.importorskip("gguf", reason="needs gguf (extra export)")
    kind = TYPES["Q8_0"]
    gguf_model.write_model(
        path, SHAPE, random_weights(SHAPE), made_tokenizer(SHAPE.vocab_size), Roles(kind, kind), "small",
        DEFAULT if is_chat else None,
    )  # fmt: skip
    return path


class Running:
    """A server that runs: where, what it said on standard error, and its process."""

    def __init__(self, process: subprocess.Popen[str], url: str, said: list[str]) -> None:
        self.process, self.url, self.said = process, url, said
        self.port = int(url.rpartition(":")[2])
        self.client = httpx.Client(base_url=url, timeout=300)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def chat(self, text: str = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": text}], **fields})

    def texts(self) -> int:
        """How many are being written or wait."""
        health = self.client.get("/health").json()
        return int(health["running"] + health["waiting"])

    def wait_until_busy(self) -> None:
        end = time.monotonic() + 60
        while not self.texts():
            assert time.monotonic() < end, "no text was begun"
            time.sleep(0.005)

    def wait_until_idle(self) -> None:
        end = time.monotonic() + 60
        while self.texts():
            assert time.monotonic() < end, "a slot is still taken"
            time.sleep(0.02)

    def logged(self, path: str, count: int = 1, holding: str = "") -> list[str]:
        """The access log's lines of a path that hold a text, once there are so many: they follow the answers."""
        end = time.monotonic() + 60
        while (
            len(lines := [each for each in self.said if f'"path":"{path}"' in each and holding in each])
            < count
        ):
            assert time.monotonic() < end, self.said
            time.sleep(0.02)
        return lines


@contextmanager
def serving(model: Path, *flags: str, **environment: str) -> Iterator[Running]:
    """A server with these flags, ended at the end, and killed if it does not end by itself."""
    for package in ("starlette", "uvicorn", "httptools", "pydantic", "llguidance", "prometheus_client"):
        pytest.importorskip(package, reason=f"needs {package} (extra serve)")
    command = [
        sys.executable,
        "-m",
        "mobilellm",
        "serve",
        str(model),
        "--port",
        "0",
        "--threads",
        "1",
        *flags,
    ]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | environment
    )
    assert process.stderr is not None
    said: list[str] = []
    started = threading.Event()

    def listen() -> None:
        for line in process.stderr or ():
            said.append(line)
            if " at http" in line:
                started.set()
        started.set()

    threading.Thread(target=listen, daemon=True).start()
    started.wait(300)
    found = next((match for line in said if (match := re.search(r" at (http://\S+)", line))), None)
    if found is None:
        process.kill()
        raise AssertionError("".join(said) or "the server said nothing")
    try:
        running = Running(process, found[1], said)
        while True:  # it says where before it listens
            try:
                running.client.get("/health")
                break
            except httpx.TransportError:
                time.sleep(0.02)
        yield running
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        finally:
            process.kill()
