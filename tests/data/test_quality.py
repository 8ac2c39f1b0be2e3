"""Each quality rule rejects its own kind of bad text, at its limit, and no good prose."""

from __future__ import annotations

from dataclasses import fields, replace
from pydoc_data.topics import topics
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.data.quality import QualityRules, broken_rule

OFF = QualityRules(
    min_characters=0,
    min_lettered_words=0,
    reject_lorem_ipsum=False,
    **{field.name: 1 for field in fields(QualityRules) if field.name.startswith("max_")},
)
PROSE = """It rained all morning, so the ferry was late and the two of us sat in the harbour office, drinking tea.

Nobody spoke much. A clerk stamped forms behind the counter; his radio told of storms further north, and of a
bridge that had been closed since Tuesday. When the boat came in at last, its engine coughing, we carried the
boxes aboard ourselves, since no porter would have done it in such weather.
"""


def numbered(count: int) -> list[str]:
    return [f"w{i}" for i in range(count)]


@pytest.mark.parametrize(
    ("rule", "limit", "passes", "breaks"),
    [
        ("min_characters", 5, "abcde", "abcd"),
        ("min_lettered_words", 0.5, "a 1 b 2", "a 1 2 3"),
        ("max_symbols", 0.1, "# " + "w " * 9, "# … " + "w " * 8),
        ("max_symbols", 0.1, "wait... " + "w " * 9, "wait... no... " + "w " * 8),
        ("max_bullet_lines", 0.5, "- a\n• b\nc\nd", "- a\n* b\n– c\nd"),
        ("max_ellipsis_lines", 0.5, "a…\nb...\nc\nd", "a…\nb...\nc …\nd"),
        ("max_duplicate_lines", 0.25, "a\nb\na\nc", "a\nb\na\na"),
        ("max_duplicate_line_characters", 0.5, "aa\nb\nb\naa", "aaaa\nb\naaaa\naaaa"),
        ("max_duplicate_paragraphs", 0.25, "a\n\nb\n\na\n\nc", "a\n\nb\n\na\n\na"),
        ("max_top_2_gram", 0.5, "a b a b c d e f", "a b a b a b c d"),
        ("max_top_3_gram", 0.5, "a b c a b c d e f g h i", "a b c a b c d e f g"),
        ("max_top_4_gram", 0.5, "a b c d a b c d e f g h i j k l", "a b c d a b c d e f"),
        ("max_duplicate_5_grams", 0.25, "a b c d e " * 2 + "f g h i j k l m n o", "a b c d e " * 2 + "f g h i j k l m"),
        ("max_duplicate_10_grams", 0.45, " ".join(numbered(10) * 2 + ["x"] * 6), " ".join(numbered(10) * 2)),
        ("reject_lorem_ipsum", True, "lorem", "Lorem ipsum dolor"),
    ],
)  # fmt: skip
def test_each_rule_at_its_limit(rule: str, limit: Any, passes: str, breaks: str) -> None:
    rules = replace(OFF, **{rule: limit})
    assert broken_rule(passes, rules) == ""
    assert broken_rule(breaks, rules) == rule
    assert broken_rule(breaks, OFF) == ""


def test_prose_passes() -> None:
    assert broken_rule(PROSE, QualityRules()) == ""
    rejected = [
        name for name, text in topics.items() if len(text) > 1000 and broken_rule(text, QualityRules())
    ]
    assert len(rejected) < 0.25 * len(topics), rejected  # Python's reference, examples and grammar included


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("buy now " * 100, "max_top_2_gram"),
        ("\n".join(f"- the item called w{i} stands in this list" for i in range(30)), "max_bullet_lines"),
        ("12 34 56 78 " * 50, "min_lettered_words"),
        ("Home\nAbout us\n" * 40, "max_duplicate_lines"),
        ("#tag #other #more words " * 20, "max_symbols"),
        ("too short", "min_characters"),
    ],
)
def test_the_usual_rubbish(text: str, rule: str) -> None:
    assert broken_rule(text, QualityRules()) == rule


@given(st.lists(st.sampled_from("abc"), max_size=60), st.sampled_from([5, 10]))
def test_repeated_runs_by_hand(words: list[str], size: int) -> None:
    seen: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for start in range(len(words) - size + 1):
        run = tuple(words[start : start + size])
        if run in seen:
            covered |= set(range(start, start + size))
        seen.add(run)
    share = len(covered) / max(1, len(words))
    for limit in (share - 0.01, share + 0.01):
        if 0 <= limit <= 1:
            expected = f"max_duplicate_{size}_grams" if share > limit and words else ""
            assert (
                broken_rule(" ".join(words), replace(OFF, **{f"max_duplicate_{size}_grams": limit}))
                == expected
            )


@given(st.text())
def test_no_text_is_too_strange(text: str) -> None:
    assert broken_rule(text, QualityRules()) in {"", *(field.name for field in fields(QualityRules))}
    assert broken_rule(text, OFF) == ""


@pytest.mark.parametrize(
    ("name", "value"), [("max_symbols", 1.5), ("min_lettered_words", -0.1), ("min_characters", -1)]
)
def test_limits_that_are_none(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"quality: {name} = {value} must"):
        QualityRules(**{name: value})  # type: ignore[arg-type]
