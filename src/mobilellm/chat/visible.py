"""Text of a model as a terminal may be given it: nothing in it moves the cursor, colours or commands.

A terminal obeys what stands in the text it is shown: escape sequences set its title, clear it, or write to
the clipboard. A model can say anything, so its control characters are shown as signs.
"""

from __future__ import annotations

_KEPT = "\n\t"
_DIRECTIONS = (*range(0x202A, 0x202F), *range(0x2066, 0x206A))
"""Overrides of the reading direction, by which a line can show something other than it holds."""

_SIGNS = (
    {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in _KEPT}  # ESC becomes ␛
    | {0x7F: "␡"}
    | {code: f"\\x{code:02x}" for code in range(0x80, 0xA0)}  # C1: 0x9b alone begins a sequence
    | {code: f"\\u{code:04x}" for code in _DIRECTIONS}
)


def visible(text: str) -> str:
    """`text` with every control character but line ends and tabs shown as a sign. Works piece by piece."""
    return text.translate(_SIGNS)
