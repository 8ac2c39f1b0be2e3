"""What a browser computes by scripts of ours, beside the Python they follow: text of tokens, sampling."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from chromium import chromium
from static_files import static_server

from mobilellm.sampling import Sampling, distribution
from mobilellm.text_stream import TextStream

if TYPE_CHECKING:
    from playwright.sync_api import Page

SCRIPTS = Path(__file__).parents[2] / "src" / "mobilellm" / "serve" / "web" / "page"
PIECES = ["<unk>", "<s>", "</s>", "▁", "▁a", "b", "ab", "▁b", "é", "🎈", "\n", "."]
PIECES += [f"<0x{byte:02X}>" for byte in (0x41, 0xC3, 0xA9, 0xF0, 0x9F, 0x8E, 0x88, 0xFF)]
STREAM = """async ([pieces, ids, stops, first]) => {
    const { TextStream, piecesOf } = await import("./text_stream.js");
    const vocabulary = Object.fromEntries(pieces.map((piece, id) => [piece, id]));
    const stream = new TextStream(piecesOf(vocabulary), stops, first);
    return [...ids.map((id) => stream.push(id)), stream.finish(), stream.isStopped];
}"""
DRAW = """async ([logits, settings, count]) => {
    const { Sampler } = await import("./sampler.js");
    const sampler = new Sampler(settings);
    return Array.from({ length: count }, () => sampler.next(Float32Array.from(logits)));
}"""


class Tokens:
    """As `Tokenizer.token_bytes` gives them."""

    def token_bytes(self, id: int) -> bytes:
        piece = PIECES[id]
        return bytes([int(piece[3:5], 16)]) if piece.startswith("<0x") else piece.replace("▁", " ").encode()


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    with static_server(SCRIPTS) as address, chromium() as browser:
        page = browser.new_page()
        page.goto(f"{address}sampler.js")
        yield page


def test_text_comes_out_as_from_python(page: Page) -> None:
    choose = random.Random(3)
    for _ in range(200):
        ids = choose.choices(range(3, len(PIECES)), k=choose.randrange(20))
        stops = choose.sample(["ab", "b", "a.", " a b", "éA", "\n\n", "🎈"], k=choose.randrange(4))
        first = choose.random() < 0.5
        stream = TextStream(Tokens(), stops, first)
        wanted = [*(stream.push(id) for id in ids), stream.finish(), stream.stopped]
        assert page.evaluate(STREAM, [PIECES, ids, stops, first]) == wanted


@pytest.mark.parametrize(("temperature", "top_p"), [(0.8, 1.0), (1.0, 0.7), (0.3, 0.95), (1.5, 0.05)])
def test_draws_from_the_same_distribution(page: Page, temperature: float, top_p: float) -> None:
    logits = np.random.default_rng(5).normal(0, 2, 50).astype(np.float32)
    settings = {"temperature": temperature, "top_p": top_p, "seed": 11}
    drawn = page.evaluate(DRAW, [logits.tolist(), settings, 20_000])
    ids, chances = distribution(logits, Sampling(temperature=temperature, top_p=top_p))
    counts = Counter(drawn)
    assert set(counts) <= set(ids.tolist())
    for id, chance in zip(ids.tolist(), chances, strict=True):
        assert abs(counts[id] / 20_000 - chance) < 5 * (chance * (1 - chance) / 20_000) ** 0.5 + 1e-3
    assert page.evaluate(DRAW, [logits.tolist(), settings, 50]) == drawn[:50]
    other = page.evaluate(DRAW, [logits.tolist(), settings | {"seed": 12}, 50])
    assert (other == drawn[:50]) == (len(ids) == 1)


def test_temperature_0_takes_the_likeliest(page: Page) -> None:
    assert page.evaluate(DRAW, [[0.5, 2.0, 2.0, -1.0], {"temperature": 0, "top_p": 0.5}, 3]) == [1, 1, 1]
