"""What can be set in a chat: how tokens are chosen, how long answers may be, where the context ends."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from mobilellm.sampling import Sampling

ContextEnd = Literal["slide", "refuse"]

SAMPLING = Sampling(temperature=0.7, top_p=0.95)
"""Unless told otherwise: the likeliest token each time makes a small model repeat itself."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Raises ValueError naming a bad field."""

    sampling: Sampling = SAMPLING
    max_tokens: int | None = None
    """Most tokens of an answer; None up to the context's end."""
    context: ContextEnd = "slide"
    """Where not all fits: leave out the oldest messages (slide), or refuse to go on (refuse)."""
    stop: tuple[str, ...] = ()
    """Texts that end an answer and are left out."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError(f"max_tokens = {self.max_tokens} must be at least 1")
        if self.context not in get_args(ContextEnd):
            raise ValueError(f"context = {self.context!r} is not known; choose slide or refuse")
        if "" in self.stop:
            raise ValueError("a stop string is empty; it would stop before the first token")

    def values(self) -> dict[str, Any]:
        """Every setting by the name that `changed` takes."""
        own = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return dataclasses.asdict(own.pop("sampling")) | own


def changed(settings: Settings, name: str, text: str) -> Settings:
    """The settings with one of them read from what a person typed. Raises ValueError naming it."""
    name = name.replace("-", "_").lower()
    if name not in _READ:
        raise ValueError(f"{name!r} is no setting; settings are {', '.join(_READ)}")
    try:
        value = _READ[name](text.strip())
    except ValueError:
        raise ValueError(f"{name} = {text.strip()!r}: {_WANTED[_READ[name]]}") from None
    if name in {each.name for each in dataclasses.fields(Sampling)}:
        return replace(settings, sampling=replace(settings.sampling, **{name: value}))
    return replace(settings, **{name: value})


def shown(value: Any) -> str:
    """A value as it is shown, and as `changed` reads it."""
    if isinstance(value, tuple):
        return " ".join(map(_escaped, value)) or "none"
    return "none" if value is None else str(value)


def _count(text: str) -> int | None:
    return None if text.lower() == "none" else int(text)


def _stop(text: str) -> tuple[str, ...]:
    """One text, in which \\n and \\t stand for what cannot be typed."""
    return () if text.lower() in ("", "none") else (text.replace("\\n", "\n").replace("\\t", "\t"),)


def _escaped(text: str) -> str:
    return text.replace("\n", "\\n").replace("\t", "\\t")


_READ: dict[str, Callable[[str], Any]] = {
    "temperature": float, "top_k": int, "top_p": float, "min_p": float, "repetition_penalty": float,
    "seed": _count, "max_tokens": _count, "context": str, "stop": _stop,
}  # fmt: skip
_WANTED: dict[Callable[[str], Any], str] = {
    float: "is no number",
    int: "is no whole number",
    _count: "is neither a whole number nor none",
}
NAMES = tuple(_READ)
