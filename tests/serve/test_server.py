"""Requests that are broken, slow, too large or given up: each is answered 4xx, and the server goes on."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from serving import JSON, Running, serving

PATHS = ("/v1/completions", "/v1/chat/completions")
NESTED = b'{"prompt": ' + b"[" * 90_000 + b"]" * 90_000 + b"}"
LONG: Any = {"prompt": "x", "max_tokens": 900, "logit_bias": {"2": -100}}
"""Runs as far as it is let: its end is never drawn."""
BROKEN = [
    b"", b"{", b"[]", b"null", b"1", b'"x"', b"{}", b'{"prompt": 1}', b'{"prompt": {"a": 1}}', b'{"prompt": null}',
    b'{"prompt": "x", "max_tokens": 1e400}', b'{"prompt": "x", "max_tokens": 99999999999999999999999999999999}',
    b'{"prompt": "x", "max_tokens": 1.5}', b'{"prompt": "x", "max_tokens": "5"}', b'{"prompt": "x", "max_tokens": true}',
    b'{"prompt": "x", "temperature": NaN}', b'{"prompt": "x", "temperature": -Infinity}',
    b'{"prompt": "x", "seed": 1e30}', b'{"prompt": "x", "seed": 9223372036854775808}',
    b'{"prompt": "x", "n": 129}', b'{"prompt": "x", "n": 100}', b'{"prompt": "\xff\xfe"}', b'{"prompt": "\xc3("}',
    b'{"prompt": "\\ud800"}', b'{"prompt": "\\udc00\\ud800"}', b'\xef\xbb\xbf{"prompt": "x"}', b'{"prompt": "x"} x',
    b"\x00" * 1000, b'{"prompt": "x", "logit_bias": {"-1": 1}}', b'{"prompt": "x", "logit_bias": {"1e9": 1}}',
    b'{"prompt": "x", "logit_bias": {"99999999999999": 1}}', b'{"prompt": "x", "stop": [1]}',
    b'{"prompt": "x", "stop": ["' + b'a", "' * 20 + b'b"]}', b'{"prompt": [[]]}', b'{"prompt": [[1], ["x"]]}',
    b'{"prompt": [1e3]}', b'{"prompt": [-1]}', b'{"prompt": [9223372036854775808]}', b'{"messages": [[]]}',
    b'{"messages": [{"role": "user"}]}', b'{"messages": [{"role": 1, "content": "x"}]}', b'{"messages": {}}',
    b'{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "tools": [{}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema"}}',
    b'{"messages": [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", '
    b'"arguments": "{"}}]}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_schema", "json_schema": '
    b'{"schema": {"$ref": "file:///etc/passwd"}}}}',
    NESTED, NESTED.replace(b"[", b'{"a":').replace(b"]", b"}")[:180_000],
]  # fmt: skip


def test_what_is_broken_is_answered_400_and_named(server: Running) -> None:
    for path in PATHS:
        for body in BROKEN:
            response = server.client.post(path, content=body, headers=JSON)
            assert response.status_code in (400, 413), body[:100]
            error = response.json()["error"]
            assert 0 < len(error["message"]) < 1000
            assert "\n" not in error["message"]
    assert server.chat(max_tokens=2).status_code == 200


def test_paths_and_methods_that_there_are_not(server: Running) -> None:
    for method, path, status in (
        ("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405), ("PATCH", "/", 405), ("OPTIONS", "/v1/completions", 405),
    ):  # fmt: skip
        response = server.client.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["message"]


def test_a_body_of_100_megabytes_is_refused_before_it_is_read(server: Running) -> None:
    for head in (b"Content-Length: 104857600", b"Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
                               b"Content-Type: application/json\r\n" + head + b"\r\n\r\n")  # fmt: skip
            part = b"x" * 65536 if b"Length" in head else b"10000\r\n" + b"x" * 65536 + b"\r\n"
            sent = 0
            try:
                while sent < 104857600 and not _readable(connection):
                    sent += connection.send(part)
            except OSError:  # it has closed
                pass
            assert sent < 20_000_000
            assert b" 413 " in _first_line(connection)


def test_what_trickles_in_is_cut_off(server: Running) -> None:
    """A head, a body, and nothing at all, each a byte at a time or never."""
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    starts = {
        "nothing": b"", "half a line": b"POST /v1/comp", "half a head": head,
        "half a body": head + b'Content-Length: 500\r\n\r\n{"prompt": "',
    }  # fmt: skip
    connections = {}
    for name, start in starts.items():
        connections[name] = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        connections[name].sendall(start)
    begun = time.monotonic()
    while time.monotonic() - begun < 1:  # one byte now and then does not help
        time.sleep(0.3)
        for name in ("half a head", "half a body"):
            if not _readable(connections[name]):
                connections[name].sendall(b"x")
    for name, connection in connections.items():
        with connection:
            assert b" 408 " in _first_line(connection), name
    assert server.client.get("/health").status_code == 200


def test_a_head_without_end_is_refused(server: Running) -> None:
    """Before a key was looked at: it would fill the memory."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ")
        with suppress(OSError):  # it is closed before all is sent
            for _ in range(64):
                connection.sendall(b"x" * 2**16)
                if _readable(connection):
                    break
        assert b" 431 Request Header Fields Too Large" in _first_line(connection)
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 2**15 + b"\r\n\r\n")
        assert b" 200 " in _first_line(connection)


def test_half_closed_in_the_middle_is_a_bad_request(server: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for start in (b"GET /hea", head, head + b"Content-Length: 50\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            connection.sendall(start)
            time.sleep(0.1)
            connection.shutdown(socket.SHUT_WR)
            assert b" 400 " in _first_line(connection), start


def test_what_is_no_http_is_refused(server: Running) -> None:
    for junk in (b"\x16\x03\x01\x02\x00\x01\x00\x01", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\0" * 100,
                 b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
                 b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
                 b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\nx"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
            try:
                connection.sendall(junk)
                connection.shutdown(socket.SHUT_WR)
                line = _first_line(connection)
            except ConnectionError:  # closed with what it had not read: as good an answer
                continue
            assert not line or line.split(b" ")[1][:1] == b"4", junk[:50]
    assert server.client.get("/health").status_code == 200


def test_a_client_that_goes_away_frees_its_slot(server: Running) -> None:
    for stream in (True, False):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            body = json.dumps({**LONG, "stream": stream}).encode()
            connection.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            server.wait_until_busy()
        server.wait_until_idle()
    lines = [json.loads(line) for line in server.logged("/v1/completions", 2, '"disconnected":true')]
    assert len(lines) >= 2
    assert all(line["completion_tokens"] < 900 for line in lines)


def _first_line(connection: socket.socket) -> bytes:
    data = b""
    while b"\r\n" not in data and (part := connection.recv(1000)):
        data += part
    return data.split(b"\r\n")[0]


def _readable(connection: socket.socket) -> bool:
    import select

    return bool(select.select([connection], [], [], 0)[0])


# Limits of the operator, and the end


@pytest.fixture(scope="module")
def narrow(chat_file: Path) -> Iterator[Running]:
    flags = ("--slots", "1", "--queue", "1", "--max-prompt-tokens", "50", "--max-new-tokens", "1000",
             "--max-seconds", "2", "--log-text")  # fmt: skip
    with serving(chat_file, *flags, MOBILELLM_ISA="scalar") as running:
        yield running


def test_a_full_queue_says_when_to_come_again(narrow: Running) -> None:
    answers: list[Any] = []
    threads = [
        threading.Thread(target=lambda: answers.append(narrow.post("/v1/completions", LONG)))
        for _ in range(5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    refused = [each for each in answers if each.status_code == 429]
    assert len(refused) == 3
    for each in refused:
        assert 1 <= int(each.headers["retry-after"]) <= 60
        assert each.json()["error"]["code"] == "queue_full"
        assert each.json()["error"]["type"] == "rate_limit_error"
    assert [each.status_code for each in answers if each not in refused] == [200, 200]
    assert (
        'mobilellm_requests_total{route="/v1/completions",status="429"} 3.0'
        in narrow.client.get("/metrics").text
    )


def test_limits_of_one_request(narrow: Running) -> None:
    for fields, named in (
        ({"prompt": "ab " * 60}, "50 is the most here"),
        ({"max_tokens": 1001}, "max_tokens: 1001 were asked for; 1000 is the most here"),
        ({"n": 3}, "3 texts were asked for at once; 2 is the most"),
    ):
        response = narrow.post("/v1/completions", {**LONG, **fields})
        assert response.status_code == 400
        assert named in response.json()["error"]["message"]


def test_the_log_has_texts_where_that_is_asked_for(narrow: Running) -> None:
    narrow.post("/v1/completions", {"prompt": "remember me", "max_tokens": 1, "user": "ann"})
    (*_, line) = narrow.logged("/v1/completions", holding="remember me")
    entry = json.loads(line)
    assert (entry["prompt"], entry["user"], entry["status"]) == ("remember me", "ann", 200)
    assert len(entry["texts"]) == 1


def test_time_is_a_limit_of_an_answer(chat_file: Path) -> None:
    with serving(chat_file, "--max-seconds", "1", MOBILELLM_ISA="scalar") as running:
        bodies = [{**LONG, "n": 16, "max_tokens": 1000, "stream": stream} for stream in (False, True)]
        whole = running.post("/v1/completions", bodies[0])
        assert {choice["finish_reason"] for choice in whole.json()["choices"]} == {"length"}
        assert whole.json()["usage"]["completion_tokens"] < 16_000
        assert running.post("/v1/completions", bodies[1]).text.endswith("data: [DONE]\n\n")
        running.wait_until_idle()


def test_told_to_end_it_lets_texts_end_and_takes_no_more(chat_file: Path) -> None:
    with serving(chat_file, "--grace", "20") as running:
        lines: list[str] = []
        reading = threading.Event()

        def read() -> None:
            with running.client.stream("POST", "/v1/completions", json={**LONG, "stream": True}) as stream:
                for line in stream.iter_lines():
                    reading.set()
                    lines.append(line)

        thread = threading.Thread(target=read)
        thread.start()
        assert reading.wait(60)
        running.process.send_signal(signal.SIGTERM)
        thread.join(60)
        assert "data: [DONE]" in lines
        assert running.process.wait(60) in (0, -signal.SIGTERM)


def test_texts_that_take_too_long_to_end_end_with_an_error(chat_file: Path) -> None:
    with serving(chat_file, "--grace", "1", MOBILELLM_ISA="scalar") as running:
        lines: list[str] = []
        body = {**LONG, "n": 8, "max_tokens": 1000, "stream": True}
        with running.client.stream("POST", "/v1/completions", json=body) as stream:
            for line in stream.iter_lines():
                if not lines:
                    running.process.send_signal(signal.SIGINT)
                lines.append(line)
        (last,) = [line for line in lines if line][-1:]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
        running.process.wait(60)
        assert not any("Traceback" in line for line in running.said)
