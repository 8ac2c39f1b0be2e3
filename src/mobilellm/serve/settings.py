"""What an operator decides: how much at once, how much for one request, and who may ask."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass, fields

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/\sA-Z]+")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """All are at least 1. ValueError names one that is not."""

    slots: int = 8
    """Texts that are written at once; each has a cache for the whole context."""
    queue: int = 32
    """Texts that wait for a slot at most; more are answered 429."""
    max_body: int = 2**20
    """Bytes of a request."""
    max_prompt_tokens: int | None = None
    """Tokens of a prompt; by default as many as the context holds."""
    max_new_tokens: int | None = None
    """New tokens of a text; by default as many as the context holds."""
    max_seconds: int = 600
    """From a request to the end of its answer; a text that is not done by then ends as at its length."""
    patience: int = 10
    """Seconds within which a request's head, and then its body, must be here."""
    grace: int = 10
    """Seconds that texts in the making are given when the server is told to end."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value < 1:
                raise ValueError(f"{field.name} = {value} must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Access:
    """Who may ask. ValueError where anyone on the network could, and nobody said that they may."""

    host: str = "127.0.0.1"
    key: str | None = None
    """Wanted of every request to /v1 and /metrics, where there is one."""
    allow_anyone: bool = False
    """Listen beyond this machine without a key."""
    hosts: tuple[str, ...] = ()
    """More names under which the server may be called; addresses, localhost and `host` always may."""
    origins: tuple[str, ...] = ()
    """Origins of other sites (https://name:port) whose pages may ask."""

    def __post_init__(self) -> None:
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and self.key.strip()):
            raise ValueError("api_key must be of visible ASCII characters, and not empty")
        for origin in self.origins:
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(
                    f"allow_origin = {origin!r} is no origin; give it as browsers do, https://name or "
                    "http://name:port, in small letters and without a path"
                )
        if not is_loopback(self.host) and self.key is None and not self.allow_anyone:
            raise ValueError(
                f"host = {self.host} can be reached by others: set a key (--api-key-file FILE, or "
                "MOBILELLM_API_KEY in the environment), or say --allow-anyone"
            )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
