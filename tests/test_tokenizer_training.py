"""Training a vocabulary: its layout, its size, its determinism, and what it refuses."""

from __future__ import annotations

import pytest

from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPACE
from mobilellm.tokenizer import Tokenizer
from tokenizer_oracles import own_text, run_python, trained


def test_training_lays_pieces_out_as_llama_does() -> None:
    assert trained().vocab_size == 700
    assert trained().pieces[:259] == LAYOUT_HEAD
    assert len(set(trained().pieces)) == 700
    single = [len(piece) == 1 for piece in trained().pieces[259:]]
    assert single == sorted(single), "merged pieces come before single characters"
    assert not any(set(piece) & set("\n\t\r") for piece in trained().pieces)
    assert not any(SPACE in piece.lstrip(SPACE) for piece in trained().pieces), "a space only begins a piece"


def test_digits_and_line_breaks_are_never_merged() -> None:
    pieces = Tokenizer.train(["in 2024 and 2024\n\nin 2024;\n\nand 2024 " * 9], 273).pieces[259:]
    assert {"2", "0", "4", "in", ";"} <= {piece.lstrip(SPACE) for piece in pieces}
    assert all(len(piece) == 1 for piece in pieces if any(map(str.isdigit, piece)))
    assert not any("\n" in piece for piece in pieces)


def test_training_compresses() -> None:
    assert len(trained().encode(own_text())) < 0.5 * len(own_text().encode())


def test_training_is_the_same_on_one_thread_and_in_another_process() -> None:
    script = """
import sys
from mobilellm.tokenizer import Tokenizer
print(Tokenizer.train([sys.stdin.read()], 700).fingerprint)
"""
    environment = {"RAYON_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "PYTHONUTF8": "1"}
    assert run_python(script, environment, input=own_text()).strip() == trained().fingerprint


@pytest.mark.parametrize(
    ("texts", "vocab_size", "message"),
    [
        ([], 300, "no text to train on"),
        (["", " ", "\n"], 300, "no text to train on"),
        (
            ["abc abc"],
            262,
            "vocab_size = 262 is too small: the 259 special and byte pieces and 4 characters need 263",
        ),
        (["abc abc"], 0, "too small"),
        (["abc abc"], 500, r"vocab_size = 500 is too large for this text, which gives at most 26\d pieces"),
        (["good", "bad \ud800"], 300, "text 1 has a lone surrogate"),
    ],
)
def test_training_refuses_what_cannot_be_done(texts: list[str], vocab_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Tokenizer.train(texts, vocab_size)


def test_training_reaches_the_largest_size_it_names() -> None:
    texts = ["one two three two one", "three two one 中文 中文"]
    with pytest.raises(ValueError, match="at most") as refused:
        Tokenizer.train(texts, 5000, character_coverage=1.0)
    largest = int(str(refused.value).split("at most ")[1].split()[0])
    assert Tokenizer.train(iter(texts), largest, character_coverage=1.0).vocab_size == largest


def test_rare_characters_are_left_to_bytes() -> None:
    texts = ["the cat sat on the mat " * 200 + "ж"]
    assert "ж" not in Tokenizer.train(texts, 275).pieces
    everything = Tokenizer.train(texts, 275, character_coverage=1.0)
    assert "ж" in everything.pieces
    with pytest.raises(ValueError, match=r"character_coverage = 1\.5 must"):
        Tokenizer.train(texts, 275, character_coverage=1.5)
