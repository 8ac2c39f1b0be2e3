"""Many clients at once, some of whom go away: no error but 429, no slot lost, memory flat, every answer right."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from serving import Running, httpx, serving

CLIENTS = 32
WARM = 500
"""Requests by which every slot was used as far as it will be, and what is made once was made."""
ENOUGH = 1000
"""Requests at least: if each left 5 KB behind, that would be more than is allowed."""


def test_a_short_load(server: Running) -> None:
    under_load(server, seconds=3, clients=12)


@pytest.mark.slow
def test_32_clients_for_a_minute(chat_file: Path) -> None:
    """In a server of its own: what other tests left free in it would hide what these requests take."""
    with serving(chat_file) as server:
        alone = _alone(server)
        _run(server, 0, CLIENTS, alone, WARM)
        server.wait_until_idle()
        before = _memory(server)
        under_load(server, 60, CLIENTS, ENOUGH)
        after = _memory(server)
    print(f"\nresident memory: {before / 1e6:.1f} MB, then {after / 1e6:.1f} MB")
    assert abs(after - before) < 0.05 * before


def under_load(server: Running, seconds: float, clients: int, least: int = 0) -> None:
    alone = _alone(server)
    counts = _run(server, seconds, clients, alone, least)
    server.wait_until_idle()
    print(f"\n{clients} clients, at least {seconds} s: {counts}")
    assert counts["wrong"] == 0
    assert counts["finished"] + counts["left"] > clients
    assert counts["left"] > 0, counts
    assert set(counts) <= {"finished", "left", "wrong", "429"}, counts
    for body, text in list(alone.items())[:2]:
        assert _text(server.client, json.loads(body)) == text


def _run(
    server: Running, seconds: float, clients: int, alone: dict[str, str], least: int = 0
) -> dict[str, int]:
    """How many requests ended how: finished, left in the middle, wrong, or with a status.

    It ends after so many seconds and so many requests, whatever comes last.
    """
    counts = {"finished": 0, "left": 0, "wrong": 0}
    lock, end = threading.Lock(), time.monotonic() + seconds

    def count(outcome: str) -> None:
        with lock:
            counts[outcome] = counts.get(outcome, 0) + 1

    def answered() -> int:
        with lock:
            return sum(counts.values())

    def ask(number: int) -> None:
        chance = random.Random(number)
        with httpx.Client(base_url=server.url, timeout=300) as client:
            asked = 0
            while time.monotonic() < end or asked < 3 or answered() < least:
                asked += 1
                body = chance.choice([*alone])
                try:
                    count(_once(client, json.loads(body), alone[body], chance))
                except Exception as error:
                    count(repr(error))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


def _once(client: httpx.Client, body: dict[str, Any], expected: str, chance: random.Random) -> str:
    leaves = chance.random() < 0.2
    if not leaves and chance.random() < 0.5:
        response = client.post("/v1/completions", json=body)
        if response.status_code != 200:
            time.sleep(0.05)
            return str(response.status_code)
        return "finished" if response.json()["choices"][0]["text"] == expected else "wrong"
    text = ""
    with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as stream:
        if stream.status_code != 200:
            time.sleep(0.05)
            return str(stream.status_code)
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                text += json.loads(line[6:])["choices"][0]["text"]
            if leaves and len(text) > 20:
                return "left"
    return "finished" if text == expected else "wrong"


def _alone(server: Running) -> dict[str, str]:
    """What is asked, and what is answered to it when nobody else asks."""
    return {body: _text(server.client, json.loads(body)) for body in _bodies()}


def _bodies() -> list[str]:
    """Prompts that begin alike and differ in length, so that slots are reused in every way."""
    words = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog"]
    return [
        json.dumps(
            {"prompt": " ".join(words[: 2 + number]), "max_tokens": 20 + 15 * number, "temperature": 0}
        )
        for number in range(7)
    ]


def _text(client: httpx.Client, body: dict[str, Any]) -> str:
    return str(client.post("/v1/completions", json=body).json()["choices"][0]["text"])


def _memory(server: Running) -> int:
    return int(server.client.get("/v1/models").json()["data"][0]["mobilellm"]["memory_bytes"])
