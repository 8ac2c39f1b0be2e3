"""Whether the Hub can be reached: told within seconds, and its libraries then keep to their cache."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import pytest
from gguf_files import SHAPE, saved

from mobilellm import hub_connection
from mobilellm.cli.main import _main
from mobilellm.hub_connection import hub_or_cache, why_unreachable


@pytest.fixture
def closed_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is said to be at a port of this machine where nobody answers."""
    for name in (
        "HF_HUB_OFFLINE",
        "TRANSFORMERS_OFFLINE",
        "http_proxy",
        "https_proxy",
        "all_proxy",
        "no_proxy",
    ):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = int(server.getsockname()[1])
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")


@pytest.mark.usefixtures("closed_port")
def test_reached_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_unreachable() == "127.0.0.1 cannot be reached: Connection refused"
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert why_unreachable() == ""
    monkeypatch.setenv("HF_ENDPOINT", "https://name.invalid")
    monkeypatch.setattr(hub_connection, "_SECONDS", 0.1)
    monkeypatch.setenv("no_proxy", "localhost")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")  # not of https
    assert why_unreachable().startswith("name.invalid cannot be reached: ")
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:1")  # which may know the way
    assert why_unreachable() == ""
    monkeypatch.setenv("no_proxy", "localhost,.invalid")
    assert why_unreachable().startswith("name.invalid cannot be reached: ")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert why_unreachable() == "HF_HUB_OFFLINE is set"


@pytest.mark.usefixtures("closed_port")
def test_a_name_that_is_looked_up_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_connection, "_SECONDS", 0.01)
    held = threading.Event()
    monkeypatch.setattr(socket, "create_connection", lambda *arguments: (held.wait(5), socket.socket())[1])
    started = time.monotonic()
    assert why_unreachable() == "127.0.0.1 cannot be reached: no answer"
    assert time.monotonic() - started < 4
    held.set()


@pytest.mark.usefixtures("closed_port")
def test_the_libraries_keep_to_their_cache_meanwhile() -> None:
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    switches = (datasets.config, hub.constants)
    before = [each.HF_HUB_OFFLINE for each in switches]
    with hub_or_cache() as reason:
        assert reason
        assert all(each.HF_HUB_OFFLINE for each in switches)
    assert [each.HF_HUB_OFFLINE for each in switches] == before


@pytest.mark.usefixtures("closed_port")
@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("eval ppl MODEL", "; name a file instead: --data wiki.test.raw"),
        (
            "eval zero-shot MODEL --tasks piqa",
            "; without a network, name a folder that holds it with --data-dir",
        ),
        ("prepare nobody/nothing --tokenizer MODEL --out OUT", "cannot be streamed from the Hub"),
        ("generate nobody/nothing hello", "; nothing of it is in the local cache, so download it where"),
    ],
)
def test_verbs_that_may_fetch_say_so_without_trying_again(
    verb: str,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    datasets, hub = pytest.importorskip("datasets"), pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "sets")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    saved(tmp_path / "model", SHAPE)
    words = [
        {"MODEL": str(tmp_path / "model"), "OUT": str(tmp_path / "out")}.get(each, each)
        for each in verb.split()
    ]
    assert _main(words) == 2
    error = capsys.readouterr().err
    assert "127.0.0.1 cannot be reached: Connection refused" in error
    assert said in error
    assert slept == []
