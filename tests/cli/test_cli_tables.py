"""Tables as they are printed: nothing in them is cut."""

from __future__ import annotations

import pytest

from mobilellm.cli.tables import print_worded_table


def test_words_are_broken_into_lines_and_none_is_lost(capsys: pytest.CaptureFixture[str]) -> None:
    said = ["; ".join(f"blk.{index}.weight, row {index}" for index in range(12)), "/" + 150 * "x", ""]
    print_worded_table(("check", "found", "compared"), [(f"check {text[:1]}", "1", text) for text in said])
    header, _, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["check", "found", "compared"]
    assert max(map(len, lines)) <= 100
    column = header.index("compared")
    words = [line[column:].strip() for line in lines]
    assert " ".join(words).replace(" ", "") == "".join(said).replace(" ", "")
    assert [line[:column].split() for line in lines if line[:column].strip()] == [
        ["check", "b", "1"], ["check", "/", "1"], ["check", "1"],
    ]  # fmt: skip
