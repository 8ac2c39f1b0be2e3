"""Short texts are encoded without the tokenizers library, to the same ids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.sentencepiece_model import LAYOUT_HEAD, SPACE, read_sentencepiece_model
from mobilellm.short_text import ShortTexts
from mobilellm.texts import Texts
from mobilellm.tokenizer import Tokenizer, merges_of
from mobilellm.tokenizer_files import backend
from tokenizer_oracles import HARD_TEXTS, TEXTS, small_model, trained


def library_ids(pieces: list[str] | tuple[str, ...], ranked: list[str], text: str) -> list[int]:
    return backend(pieces, merges_of(ranked, pieces)).encode(text, add_special_tokens=False).ids


def short_ids(
    pieces: list[str] | tuple[str, ...], ranked: list[str] | tuple[str, ...], text: str
) -> list[int]:
    return ShortTexts(Texts.of(pieces), [pieces.index(piece) for piece in ranked]).encode(text)


@pytest.mark.parametrize("text", HARD_TEXTS, ids=repr)
def test_hard_texts(text: str) -> None:
    model = read_sentencepiece_model(small_model())
    assert short_ids(model.pieces, model.ranked, text) == library_ids(model.pieces, list(model.ranked), text)


@given(text=TEXTS)
@settings(deadline=None)
def test_any_text(text: str) -> None:
    pieces = trained().pieces
    fresh = Tokenizer(pieces, ranked=[pieces.index("".join(merge)) for merge in trained().merges])
    assert fresh.encode(text) == Tokenizer(trained().pieces, trained().merges).encode(text)


@given(
    ranked=st.lists(
        st.text(alphabet=f"ab{SPACE}\n中文é🙂", min_size=2, max_size=5), max_size=14, unique=True
    ),
    with_break=st.booleans(),
    text=st.text(alphabet=f" ab\n{SPACE}é中文🙂字", max_size=40),
)
@settings(deadline=None, max_examples=400)
def test_any_vocabulary(ranked: list[str], with_break: bool, text: str) -> None:
    ranked = [piece for piece in ranked if with_break or "\n" not in piece]
    pieces = [*LAYOUT_HEAD, *ranked, SPACE, *"ab中文é🙂", *(["\n"] if with_break else [])]
    assert short_ids(pieces, ranked, text) == library_ids(pieces, ranked, text)


@pytest.mark.parametrize("text", ["a\na a\n", "\n\n a", "a \n<0x0A>a"])
def test_a_vocabulary_that_merges_bytes(text: str) -> None:
    ranked = ["<0x0A>a", f"{SPACE}<0x0A>"]
    pieces = [*LAYOUT_HEAD, *ranked, SPACE, "a"]
    assert short_ids(pieces, ranked, text) == library_ids(pieces, ranked, text)


def test_the_vocabulary_of_llama(shared: Path) -> None:
    model = shared / "tokenizer" / "llama_sp_32k.tokenizer.model"
    if not model.is_file():
        pytest.skip(f"needs {model.name}")
    tokenizer = Tokenizer.from_sentencepiece(model)
    text = (shared / "tokenizer" / "PROVENANCE.md").read_text(encoding="utf-8")[:1500]
    first = tokenizer.encode(text)
    assert "_backend" not in vars(tokenizer)
    assert tokenizer.decode(first) == text
    long = [*HARD_TEXTS, text, text]
    assert sum(map(len, long)) > 2000
    assert tokenizer.encode_batch(long)[-1] == first
    assert "_backend" in vars(tokenizer)
    again = Tokenizer.from_sentencepiece(model)
    assert again.encode_batch(HARD_TEXTS) == tokenizer.encode_batch(HARD_TEXTS)


def test_after_some_texts_the_library_does_it() -> None:
    tokenizer = Tokenizer.from_sentencepiece(small_model())
    text = "the library does it, sooner or later " * 10
    for _ in range(5):
        assert "_backend" not in vars(tokenizer)
        first = tokenizer.encode(text)
    assert tokenizer.encode(text) == first
    assert "_backend" in vars(tokenizer)


def test_a_model_opens_without_the_library() -> None:
    code = (
        "import sys\nfrom mobilellm.tokenizer import Tokenizer\n"
        f"tokenizer = Tokenizer.from_sentencepiece({str(small_model())!r})\n"
        "tokenizer.decode(tokenizer.encode('some words'))\n"
        "sys.exit('tokenizers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
