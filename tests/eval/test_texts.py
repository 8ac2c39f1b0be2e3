from __future__ import annotations

from pathlib import Path

import pytest

from mobilellm.eval.texts import articles, joined_rows, read_text, whole

WIKI = " \n = First = \n \n Some words , here . \n \n = = Section = = \n \n More @-@ words . \n \n = Second = \n \n x = 3 \n"


def test_rows_are_joined_by_blank_lines_and_blank_rows_hold_nothing(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text(" \nx \n\ny\u2028z\nlast", encoding="utf-8")
    assert joined_rows(read_text(file)) == "\n\n".join(["", "x \n", "", "y\u2028z\n", "last"])


def test_articles_begin_at_first_level_headings_and_become_ordinary_english(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    file = tmp_path / "wiki.txt"
    file.write_text(WIKI, encoding="utf-8")
    first, second = articles(read_text(file))
    assert first.original.startswith(" = First = \n")
    assert "Some words, here." in first.content
    assert "More-words." in first.content
    assert "Section" in first.content
    assert second.original == " = Second = \n \n x = 3 \n"
    assert second.words == len(["", "=", "Second", "=", "x", "=", "3", ""])
    assert second.bytes == len(second.original)


def test_wikitext2_has_the_tokens_and_articles_that_others_count(shared: Path) -> None:
    pytest.importorskip("lm_eval")
    from mobilellm.tokenizer import Tokenizer

    text = read_text(shared / "wikitext2/wiki.test.raw")
    tokenizer = Tokenizer.load(shared / "tokenizer/llama_sp_32k.tokenizer.model")
    assert len(tokenizer.encode(joined_rows(text))) == 341_469
    assert len(articles(text)) == 62


def test_a_whole_text_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("two wörds", encoding="utf-8")
    (document,) = whole(read_text(file))
    assert (document.words, document.bytes) == (2, 10)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "is no UTF-8 text (byte 0"), (b" \n \n", "is empty"), (None, "is a directory")],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "a.txt"
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match="a.txt: ") as caught:
        read_text(file)
    assert message in str(caught.value)


def test_a_text_without_headings_has_no_articles(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    file = tmp_path / "a.txt"
    file.write_text("plain", encoding="utf-8")
    with pytest.raises(ValueError, match="not WikiText"):
        articles(read_text(file))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read_text(tmp_path / "nowhere.txt")
