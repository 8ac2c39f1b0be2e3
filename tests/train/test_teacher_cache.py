"""The files of a teacher's top k: whole, checked when read, refused for anything else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_teachers import IDENTITY, passages

from mobilellm.train.teacher_cache import CacheError, Passage, TeacherCache, TopK, ids_dtype, open_cache

PASSAGES = passages(7)


def tops(some: list[Passage], seed: int = 0) -> Iterator[tuple[bytes, TopK]]:
    draw = np.random.default_rng(seed)
    for passage in some:
        n, k = int(passage.counted.sum()), IDENTITY.top_k
        ids = draw.integers(0, IDENTITY.vocab_size, (n, k)).astype(ids_dtype(IDENTITY.vocab_size))
        yield passage.key, TopK(ids, -draw.random((n, k + 1)).astype(np.float16))


def filled(directory: Path) -> TeacherCache:
    cache = open_cache(directory, IDENTITY)
    cache.write(list(tops(PASSAGES[:4])), cache.next_number)
    cache.refresh()
    cache.write(list(tops(PASSAGES[4:])), cache.next_number)
    cache.refresh()
    return cache


def test_what_was_written_is_read(tmp_path: Path) -> None:
    filled(tmp_path / "cache")
    cache = open_cache(tmp_path / "cache", IDENTITY)
    assert len(cache) == len(PASSAGES)
    assert cache.next_number == 2
    assert open_cache(tmp_path / "cache", None).identity == IDENTITY
    wanted = [*tops(PASSAGES[:4]), *tops(PASSAGES[4:])]
    for passage, (key, top) in zip(PASSAGES, wanted, strict=True):
        assert key in cache
        ids, logs = cache.read(passage)
        assert np.array_equal(ids, top.ids)
        assert np.array_equal(logs, top.logs)


def test_a_passage_is_known_by_its_tokens_and_what_counts() -> None:
    passage = passages(1)[0]
    counted = ~passage.counted
    others = [
        passage._replace(tokens=np.roll(passage.tokens, 1)),
        passage._replace(counted=counted),
        Passage(passage.tokens[1:], passage.counted[1:]),
    ]
    assert len({each.key for each in (passage, *others)}) == 4
    assert passage._replace(tokens=passage.tokens.astype(np.uint16)).key == passage.key


@pytest.mark.parametrize(
    ("name", "value"),
    [("teacher", "other"), ("tokenizer", "other"), ("vocab_size", 99), ("top_k", 4), ("temperature", 1.0)],
)
def test_another_teacher_or_question_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    filled(tmp_path / "cache")
    changed: dict[str, Any] = {name: value}
    with pytest.raises(CacheError, match=rf"another teacher's cache \({name} = .* there, .*{value}.* here\)"):
        open_cache(tmp_path / "cache", replace(IDENTITY, **changed))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no teacher's cache there; name the teacher"):
        open_cache(tmp_path / "cache", None)
    cache = filled(tmp_path / "cache")
    with pytest.raises(CacheError, match=r"has nothing for a passage of this data"):
        cache.read(passages(1, seed=1)[0])
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    (tmp_path / "file").touch()
    with pytest.raises(CacheError, match=r"file: is a file; choose another distill\.cache"):
        open_cache(tmp_path / "file", IDENTITY)
    (tmp_path / "file").unlink()
    with pytest.raises(CacheError, match=r"holds something else than a teacher's cache"):
        open_cache(tmp_path / "notes", IDENTITY)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "x"}', '{"format": "mobilellm-teacher-cache-1"}'])
def test_a_description_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    filled(tmp_path / "cache")
    (tmp_path / "cache" / "cache.json").write_text(text)
    with pytest.raises(CacheError, match=r"cache\.json: .*choose another distill\.cache"):
        open_cache(tmp_path / "cache", IDENTITY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    filled(directory := tmp_path_factory.mktemp("whole") / "cache")
    return directory


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), cut=st.booleans())
def test_no_damaged_byte_is_read_as_if_it_were_whole(whole: Path, place: float, flip: int, cut: bool) -> None:
    """A part is refused, or a passage of it is, or found missing; what is read is what was written."""
    file = whole / "part-000000.safetensors"
    good = file.read_bytes()
    at = int(place * len(good))
    try:
        file.write_bytes(good[:at] if cut else good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :])
        wanted = dict([*tops(PASSAGES[:4]), *tops(PASSAGES[4:])])
        try:
            cache = open_cache(whole, IDENTITY)
        except CacheError:
            return
        for passage in PASSAGES:
            try:
                ids, logs = cache.read(passage)
            except CacheError:
                continue
            assert np.array_equal(ids, wanted[passage.key].ids)
            assert np.array_equal(logs, wanted[passage.key].logs)
    finally:
        file.write_bytes(good)
