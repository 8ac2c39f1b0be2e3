"""A sample is bounded, depends on the texts alone, and is a fair part of them."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobilellm.data import sample as sample_module
from mobilellm.data.prepare_settings import PrepareSettings
from mobilellm.data.sample import Sample, sample_texts


def write(path: Path, texts: list[str]) -> Path:
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def sample(path: Path, most: int) -> Sample:
    return sample_texts([str(path)], PrepareSettings(), most)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.text("abé ", min_size=1, max_size=60).filter(str.strip), min_size=1, max_size=40),
    st.integers(1, 900),
    st.randoms(),
)
def test_bounded_and_free_of_order(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], most: int, generator: random.Random
) -> None:
    folder = tmp_path_factory.mktemp("sample")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_module, "_PART", 20)
        first = sample(write(folder / "a.jsonl", texts), most)
        shuffled = texts + texts[:3]
        generator.shuffle(shuffled)
        assert sample(write(folder / "b.jsonl", shuffled), most).texts == first.texts
        everything = sample(folder / "a.jsonl", 10**6)
    assert first.sample_bytes == sum(len(text.encode()) for text in first.texts)
    assert first.sample_bytes <= most or len(first.texts) == 1
    assert first.texts == everything.texts[: len(first.texts)]  # the lowest hashes
    assert everything.text_bytes == first.text_bytes >= everything.sample_bytes
    if len(first.texts) < len(everything.texts):  # and no more would have fitted
        following = everything.texts[len(first.texts)]
        assert first.sample_bytes + len(following.encode()) > most
    words = " ".join(everything.texts).split()
    assert set(words) == {word for text in texts for word in text.split()}  # no word was cut


def test_a_fair_part_of_all_files(tmp_path: Path) -> None:
    for name in "abcd":
        write(tmp_path / f"{name}.jsonl", [f"{name} {i} " + "word " * 20 for i in range(500)])
    texts = sample(tmp_path, 50_000).texts
    counts = [sum(text.startswith(name) for text in texts) for name in "abcd"]
    assert 380 < sum(counts) == len(texts) < 520
    assert min(counts) > 70


def test_what_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(
        'nonsense\n{"text": "good \\ud83d bad"}\n{"text": "fine"}\n{"body": "x"}\n'
    )
    found = sample(tmp_path / "x.jsonl", 1000)
    assert (found.texts, found.unread) == (["fine"], 2)
    (tmp_path / "x.jsonl").write_text('{"body": "x"}\n')
    with pytest.raises(
        ValueError, match=r"no text to sample \(1 records without\); records have the fields body, not 'text'"
    ):
        sample(tmp_path / "x.jsonl", 1000)
    with pytest.raises(ValueError, match="must have at least 1"):
        sample(tmp_path / "x.jsonl", 0)
