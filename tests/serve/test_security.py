"""Who may ask: hosts, origins, keys, and where the server listens."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import JSON, Running, serving

from mobilellm.cli.main import main
from mobilellm.serve.settings import Access

KEY = "k-123456"
BODY = {"prompt": "x", "max_tokens": 2}


@pytest.fixture(scope="module")
def guarded(chat_file: Path) -> Iterator[Running]:
    flags = ("--allow-origin", "https://friend.example", "--allow-host", "model.lan")
    with serving(chat_file, *flags, MOBILELLM_API_KEY=KEY) as running:
        yield running


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.nip.io", "", "a b", "[::1", "x@127.0.0.1"]
)
def test_a_name_that_was_made_to_point_here_is_refused(server: Running, host: str) -> None:
    response = server.client.get("/v1/models", headers={"Host": host})
    assert response.status_code in (400, 403)
    assert "error" in response.json()


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:1234", "127.0.0.1", "[::1]:8000", "192.168.1.7:8000"]
)
def test_addresses_and_localhost_are_names_of_it(server: Running, host: str) -> None:
    assert server.client.get("/health", headers={"Host": host}).status_code == 200


def test_two_hosts_are_none(server: Running) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n")
        assert b" 403 " in connection.recv(1000).split(b"\r\n")[0]


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:1"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
        {"Sec-Fetch-Site": "same-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "iframe"},
    ],
)
def test_a_page_of_another_site_is_refused(server: Running, headers: dict[str, str]) -> None:
    assert server.post("/v1/completions", BODY, headers=headers).status_code == 403
    assert server.client.get("/v1/models", headers=headers).status_code == 403


def test_its_own_page_may_ask_and_a_link_may_lead_to_it(server: Running) -> None:
    own = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert server.post("/v1/completions", BODY, headers=own).status_code == 200
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert server.client.get("/", headers=link).status_code == 200


def test_a_form_of_a_page_cannot_write(server: Running) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        response = server.client.post(
            "/v1/completions", content=b'{"prompt": "x"}', headers={"Content-Type": kind}
        )
        assert response.status_code == 415


def test_an_allowed_origin_may_ask(guarded: Running) -> None:
    origin = {"Origin": "https://friend.example"}
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = guarded.client.options("/v1/completions", headers=origin | asked)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == origin["Origin"]
    assert "authorization" in preflight.headers["access-control-allow-headers"]
    answer = guarded.post("/v1/completions", BODY, headers=origin | {"Authorization": f"Bearer {KEY}"})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == origin["Origin"]
    other = guarded.client.options(
        "/v1/completions", headers={"Origin": "https://friend.example.evil"} | asked
    )
    assert other.status_code == 403
    assert "access-control-allow-origin" not in other.headers


def test_a_key_is_wanted_where_there_is_one(guarded: Running) -> None:
    for given in (
        "",
        "Bearer",
        "Bearer x",
        f"Basic {KEY}",
        f"Bearer {KEY}x",
        f"Bearer {KEY[:-1]}",
        KEY,
        "Bearer \xff",
    ):
        headers = {"Authorization": given.encode("latin-1")}
        response = guarded.client.get("/v1/models", headers=headers)
        assert response.status_code == 401, given
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert guarded.client.get("/metrics", headers=headers).status_code == 401
    for given in (f"Bearer {KEY}", f"bearer {KEY}"):
        assert guarded.client.get("/v1/models", headers={"Authorization": given}).status_code == 200
    assert guarded.client.get("/health").status_code == 200
    assert guarded.client.get("/").status_code == 200
    assert guarded.client.get("/health", headers={"Host": "model.lan:8000"}).status_code == 200
    assert not any(KEY in line for line in guarded.said)


def test_paths_lead_to_no_files(server: Running) -> None:
    for path in ("/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2fetc/passwd", "//etc/passwd",
                 "/page.js/..", "/.git", "/app.py", "/index.html%00", "/v1/models/..%2f..%2fetc"):  # fmt: skip
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(
                f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode()
            )
            answer = b""
            while part := connection.recv(65536):
                answer += part
        assert answer.split(b" ")[1] in (b"404", b"400"), path
        assert b"root:" not in answer


def test_the_page_may_run_nothing_but_its_own_files(server: Running) -> None:
    page = server.client.get("/")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["x-frame-options"] == "DENY"
    again = server.client.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    script = server.client.get("/page.js")
    assert script.headers["content-type"] == "text/javascript; charset=utf-8"


def test_listening_beyond_this_machine_takes_a_key_or_a_word() -> None:
    with pytest.raises(ValueError, match=r"host = 0\.0\.0\.0 can be reached by others.*--allow-anyone"):
        Access(host="0.0.0.0")
    Access(host="0.0.0.0", key="k")
    Access(host="0.0.0.0", allow_anyone=True)
    for host in ("localhost", "127.0.0.1", "127.3.4.5", "::1"):
        Access(host=host)
    for key in ("", " ", "kö", "a\nb"):
        with pytest.raises(ValueError, match="api_key must be of visible ASCII"):
            Access(key=key)


def test_an_origin_that_no_browser_sends_is_refused() -> None:
    Access(origins=("https://a.example", "http://localhost:3000", "http://[::1]:3000"))
    for origin in ("a.example", "https://a.example/", "https://A.example", "*", "null"):
        with pytest.raises(ValueError, match="allow_origin = .* is no origin"):
            Access(origins=(origin,))


def test_the_command_line_refuses_in_one_line(
    chat_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MOBILELLM_API_KEY", raising=False)
    empty = tmp_path / "key"
    empty.write_text("\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for flags, said in (
            (["--host", "0.0.0.0"], "--host 0.0.0.0 can be reached by others"),
            (["--port", port], "cannot listen"),
            (["--port", "70000"], "--port 70000 must be in 0 … 65535"),
            (["--slots", "0"], "--slots 0 must be at least 1"),
            (["--api-key-file", str(tmp_path / "none")], "No such file"),
            (["--api-key-file", str(empty)], "api_key must be of visible ASCII"),
            (["--api-key", "a", "--api-key-file", str(empty)], "leave one out"),
        ):
            with pytest.raises(SystemExit) as stop:
                main(["serve", str(chat_file), *flags])
            assert stop.value.code == 2
            message = capsys.readouterr().err
            assert said in message
            assert message.count("\n") == 1


def test_headers_of_requests_are_not_in_the_log(guarded: Running) -> None:
    guarded.post(
        "/v1/completions",
        {**BODY, "prompt": "very secret"},
        headers=JSON | {"Authorization": f"Bearer {KEY}"},
    )
    lines = guarded.logged("/v1/completions")
    assert "secret" not in "".join(guarded.said)
    assert any('"prompt_tokens":' in line for line in lines)
