"""Shared bands follow the true similarity of two texts as the formula says."""

from __future__ import annotations

import random
from hashlib import blake2b

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from mobilellm.data.near_duplicates import PERMUTATIONS, Bands, Signer, bands_for


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of the five-word runs, by hand."""
    first, second = (
        {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))} for words in (a.split(), b.split())
    )
    return len(first & second) / len(first | second)


def pair(generator: random.Random, changed: float) -> tuple[str, str]:
    words = [f"word{generator.randrange(10_000)}" for _ in range(400)]
    other = [f"new{generator.randrange(10_000)}" if generator.random() < changed else word for word in words]
    return " ".join(words), " ".join(other)


@pytest.mark.parametrize("changed", [0.0, 0.01, 0.03, 0.06, 0.5])
def test_bands_are_shared_as_often_as_the_formula_says(changed: float) -> None:
    bands, generator = bands_for(0.8), random.Random(0)
    signer = Signer(bands)
    expected, shared = [], []
    for _ in range(150):
        a, b = pair(generator, changed)
        s = similarity(a, b)
        expected.append(1 - (1 - s**bands.rows) ** bands.bands)
        shared.append(bool((signer.digests(a) == signer.digests(b)).any()))
    assert abs(np.mean(shared) - np.mean(expected)) < 0.1
    assert changed != 0.0 or all(shared)
    assert changed != 0.5 or not any(shared)


@pytest.mark.parametrize("threshold", [0.5, 0.8])
def test_the_same_texts_as_an_index_of_datasketch_finds(threshold: float) -> None:
    """Its MinHashLSH over the same runs of words, each text asked for before it is put in."""
    generator = random.Random(3)
    texts: list[str] = []
    for _ in range(60):
        texts += pair(generator, generator.choice([0.005, 0.02, 0.05, 0.1]))
    generator.shuffle(texts)
    signer, index = Signer(bands_for(threshold)), MinHashLSH(threshold, PERMUTATIONS)
    seen: set[int] = set()
    ours, theirs = [], []
    for number, text in enumerate(texts):
        digests = signer.digests(text).tolist()
        ours.append(not seen.isdisjoint(digests))
        seen.update(digests)
        words = text.split()
        signature = MinHash(PERMUTATIONS, seed=1, hashfunc=run_hash, scheme="affine32")
        signature.update_batch([words[i : i + 5] for i in range(len(words) - 4)])
        theirs.append(bool(index.query(signature)))
        index.insert(number, signature)
    assert ours == theirs
    assert 20 < sum(ours) < 60


def run_hash(words: list[str]) -> int:
    """32 bits of a polynomial in the words' own hashes, from its definition."""
    numbers = [int.from_bytes(blake2b(word.encode(), digest_size=8).digest(), "little") for word in words]
    total = sum(number * pow(0x9E3779B97F4A7C15, i, 2**64) for i, number in enumerate(numbers, 1)) % 2**64
    return (total ^ (total >> 32)) % 2**32


def test_the_same_everywhere() -> None:
    """Digests are stored and compared across processes and versions: these must not change."""
    bands = Bands(3, 2)
    first = Signer(bands).digests("the quick brown fox jumps over the lazy dog again")
    assert (
        first.tolist()
        == Signer(bands).digests("the  quick brown\nfox jumps over the lazy dog again ").tolist()
    )
    assert first.dtype == np.uint64
    assert len(set(first.tolist())) == 3


def test_short_and_long_texts() -> None:
    signer = Signer(bands_for(0.7))
    short = [signer.digests(text).tolist() for text in ("a", "a b", "b a", "a b c d", "a b c d e")]
    assert len({tuple(digests) for digests in short}) == 5
    long = " ".join(f"w{i}" for i in range(20_000))
    assert signer.digests(long).tolist() == Signer(bands_for(0.7)).digests(long).tolist()


def test_thresholds() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9):
        bands = bands_for(threshold)
        assert bands.bands * bands.rows <= 128
        at = [1 - (1 - s**bands.rows) ** bands.bands for s in (threshold - 0.2, threshold + 0.1)]
        assert at[0] < 0.3
        assert at[1] > 0.7
    for bad in (0.0, 1.0, -1.0, 2.0):
        with pytest.raises(ValueError, match=f"threshold = {bad} must lie between 0 and 1"):
            bands_for(bad)
