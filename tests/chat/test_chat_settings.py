"""Settings are read as they are shown, and refused by name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.chat.settings import NAMES, Settings, changed, shown
from mobilellm.chat.visible import visible


def test_every_setting_reads_what_it_shows() -> None:
    settings = Settings()
    for name, value in (
        ("temperature", "0.25"), ("top_k", "5"), ("top-p", "0.5"), ("min_p", "0.1"), ("seed", "7"),
        ("repetition_penalty", "1.5"), ("max_tokens", "9"), ("context", "refuse"), ("stop", "\\nUser:"),
    ):  # fmt: skip
        settings = changed(settings, name, value)
        assert shown(settings.values()[name.replace("-", "_")]) == value
    assert settings.stop == ("\nUser:",)
    assert set(settings.values()) == set(NAMES)
    again = Settings()
    for name, value in settings.values().items():
        again = changed(again, name, shown(value))
    assert again == settings
    assert changed(changed(settings, "seed", "none"), "stop", "none").stop == ()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("colour", "1", "'colour' is no setting; settings are temperature, top_k"),
        ("temperature", "hot", "temperature = 'hot': is no number"),
        ("temperature", "-1", "temperature = -1.0 must be 0"),
        ("top_k", "1.5", "top_k = '1.5': is no whole number"),
        ("seed", "x", "seed = 'x': is neither a whole number nor none"),
        ("max_tokens", "0", "max_tokens = 0 must be at least 1"),
        ("context", "roll", "context = 'roll' is not known; choose slide or refuse"),
    ],
)
def test_mistakes(name: str, value: str, words: str) -> None:
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        changed(Settings(), name, value)


def test_nothing_a_model_says_is_obeyed_by_a_terminal() -> None:
    assert visible("\x1b]0;title\x07\x1b[2J") == "␛]0;title␇␛[2J"
    assert visible("\x9b31m\x7f\r\b") == "\\x9b31m␡␍␈"
    assert visible("\u202eabc") == "\\u202eabc"
    assert visible("plain\n\ttext é 中 🙂") == "plain\n\ttext é 中 🙂"


@given(st.text())
def test_no_control_character_is_left(text: str) -> None:
    out = visible(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 for c in out)
    assert "".join(visible(c) for c in text) == out
