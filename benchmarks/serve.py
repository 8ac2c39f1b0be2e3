"""What the HTTP server adds to the runtime, and where the servers of llama.cpp stand on the same file.

    python benchmarks/serve.py --peer llama-server --python-peer venv/bin/python --json serve.json

Runtime: tokens a second of the engine alone, and of the runtime writing one text and eight. Server: the same
over HTTP, streamed, read by this process from a socket; time to the first token of a short prompt. Peers are
llama.cpp's own server, which writes eight texts at once, and llama-cpp-python's, in an interpreter that has
llama-cpp-python[server]. Contestants take turns, medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import machine
from model_files import gguf_file

import mobilellm.runtime
from mobilellm.runtime.batch import ContinuousBatch
from mobilellm.runtime.bench import RuntimeContestant
from mobilellm.sampling import Sampling

PROMPT = "the quick brown fox jumps over the lazy dog and runs"
NEW, TEXTS = 128, 8
GREEDY = Sampling()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="125m:Q8_0", help="SHAPE:TYPE, or a .gguf file")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", type=Path, help="the program llama-server")
    parser.add_argument("--python-peer", type=Path, help="python that has llama-cpp-python[server]")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = gguf_file(arguments.model, folder)
        threads, peers = arguments.threads, dict[str, list[str]]()
        if arguments.peer is not None:
            peers["llama_server"] = _llama_server(arguments.peer, file, threads)
        if arguments.python_peer is not None:
            peers["llama_cpp_python"] = _llama_cpp_python(arguments.python_peer, file, threads)
        measured = _measured(file, threads, arguments.rounds, peers)
    machine.write(arguments.json, {"model": arguments.model, "threads": arguments.threads, **measured})


def _measured(file: Path, threads: int, rounds: int, peers: dict[str, list[str]]) -> dict[str, Any]:
    """The engine alone is in this process; it sleeps while a server is asked. `peers`: their commands."""
    contestants: dict[str, Callable[[], float]] = {}
    engine = RuntimeContestant(str(file), threads, 64 + NEW)
    contestants["engine_decode"] = lambda: NEW / engine.decode(12, NEW)
    model = mobilellm.runtime.load(file, threads, engine="native")
    with ContinuousBatch(model, TEXTS) as batch:
        contestants["runtime_one"] = lambda: _written(batch, 1)
        contestants["runtime_eight"] = lambda: _written(batch, TEXTS)
        with ExitStack() as servers:
            for name, command in ({"server": _ours(file, threads)} | peers).items():
                contestants |= _asked(name, servers.enter_context(_server(command)))
            return _turns(contestants, rounds, peers)


def _asked(name: str, port: int) -> dict[str, Callable[[], float]]:
    return {
        f"{name}_one": lambda: _streamed(port, 1),
        f"{name}_eight": lambda: _streamed(port, TEXTS),
        f"{name}_first_token_ms": lambda: 1000 * _first_token(port),
    }


def _turns(contestants: dict[str, Callable[[], float]], rounds: int, peers: Iterable[str]) -> dict[str, Any]:
    for measure in contestants.values():  # warm
        measure()
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, measure in contestants.items():
            taken[name].append(measure())
    figures = {name: round(statistics.median(each), 2) for name, each in taken.items()}
    ratios = {
        "server_one_to_engine": round(figures["server_one"] / figures["engine_decode"], 3),
        "server_one_to_runtime": round(figures["server_one"] / figures["runtime_one"], 3),
        "server_eight_to_one": round(figures["server_eight"] / figures["server_one"], 2),
    }
    for peer in peers:
        ratios |= {
            f"to_{peer}_{n}": round(figures[f"server_{n}"] / figures[f"{peer}_{n}"], 2)
            for n in ("one", "eight")
        }
    return {"tokens_per_second": figures, "ratios": ratios, "rounds": taken}


def _written(batch: ContinuousBatch, count: int) -> float:
    requests = [batch.add(_prompt(number), GREEDY, NEW) for number in range(count)]
    times: list[list[float]] = [[] for _ in range(count)]
    threads = [
        threading.Thread(
            target=lambda request, its: its.extend(time.perf_counter() for piece in request if piece.token),
            args=pair,
        )
        for pair in zip(requests, times, strict=True)
    ]
    _together(threads)
    return _rate([(each[0], each[-1], len(each)) for each in times])


def _streamed(port: int, count: int) -> float:
    texts: list[tuple[float, float, int]] = []
    _together([threading.Thread(target=lambda n=n: texts.append(_one(port, n))) for n in range(count)])
    assert len(texts) == count, "a stream failed"
    return _rate(texts)


def _one(port: int, number: int, tokens: int = NEW) -> tuple[float, float, int]:
    """When the first and the last token of a text came, and how many there were.

    The stream is only taken apart afterwards: this process has the same two cores.
    """
    body = {"prompt": _prompt(number), "max_tokens": tokens, "temperature": 0, "stream": True}
    data = json.dumps(body).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(data)}\r\nConnection: close\r\n\r\n"
    )
    parts: list[tuple[float, bytes]] = []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(head.encode() + data)
        while part := connection.recv(65536):
            parts.append((time.perf_counter(), part))
    with_text = [when for when, part in parts if b'"text":' in part.replace(b" ", b"")]
    count = b"".join(part for _, part in parts).replace(b" ", b"").count(b'"text":"')
    assert len(with_text) > 1 or tokens == 1, parts[:3]
    return with_text[0], with_text[-1], min(count, tokens)


def _first_token(port: int) -> float:
    """Seconds from before the connection is made to the first token of a prompt that was not seen before."""
    start = time.perf_counter()
    return _one(port, time.perf_counter_ns() % 10**6, tokens=1)[0] - start


def _rate(texts: list[tuple[float, float, int]]) -> float:
    """Tokens a second of all texts together, from the first token of all to the last."""
    first, last = min(each[0] for each in texts), max(each[1] for each in texts)
    return (sum(count for _, _, count in texts) - 1) / (last - first)


def _prompt(number: int) -> str:
    return f"{number} {PROMPT}"


def _together(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _ours(file: Path, threads: int) -> list[str]:
    return [sys.executable, "-m", "mobilellm", "serve", str(file), "--threads", str(threads), "--port"]


def _llama_server(program: Path, file: Path, threads: int) -> list[str]:
    """With room for eight texts of 2,048 tokens; all else as it chooses itself."""
    return [
        str(program), "--model", str(file), "--threads", str(threads), "--threads-batch", str(threads),
        "--parallel", str(TEXTS), "--ctx-size", str(TEXTS * 2048), "--port",
    ]  # fmt: skip


def _llama_cpp_python(python: Path, file: Path, threads: int) -> list[str]:
    """One text at a time is what it can do; told not to give up the one for the next."""
    return [
        str(python), "-m", "llama_cpp.server", "--model", str(file), "--n_threads", str(threads),
        "--n_threads_batch", str(threads), "--n_ctx", "2048", "--interrupt_requests", "false", "--port",
    ]  # fmt: skip


@contextmanager
def _server(command: list[str]) -> Iterator[int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield port
    finally:
        process.terminate()
        process.wait()


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}: {process.args}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=1):
                return
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"no server at port {port}")


if __name__ == "__main__":
    main()
