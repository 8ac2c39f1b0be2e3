"""Whether the Hugging Face Hub can be reached, asked once and quickly.

Its libraries try for half a minute before they say that it cannot, or look into their cache.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator

_SECONDS = 3.0
"""That a name may take to be looked up, and then a connection to be made."""
_SWITCHES = ("huggingface_hub.constants", "datasets.config")
"""Modules with a switch HF_HUB_OFFLINE, read from the environment when they are imported."""


def why_unreachable() -> str:
    """Why the Hub cannot be asked, in words; "" where it can, as far as a connection tells, or by a proxy."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        if os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE"):
            return f"{name} is set"
    address = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if not address.hostname or _is_by_proxy(address.scheme, address.hostname):
        return ""
    found: list[str] = []
    place = address.hostname, address.port or (80 if address.scheme == "http" else 443)

    def connect() -> None:
        try:
            socket.create_connection(place, _SECONDS).close()
            found.append("")
        except OSError as error:
            found.append(error.strerror or str(error))

    # Looking up a name has no limit of its own.
    thread = threading.Thread(target=connect, name="hub", daemon=True)
    thread.start()
    thread.join(2 * _SECONDS)
    reason = found[0] if found else "no answer"
    return f"{address.hostname} cannot be reached: {reason}" if reason else ""


def _is_by_proxy(scheme: str, host: str) -> bool:
    """Whether a proxy is asked, which looks names up itself. NO_PROXY is none, and excepts hosts from it."""
    proxies = urllib.request.getproxies()
    return not {scheme, "all"}.isdisjoint(proxies) and not urllib.request.proxy_bypass(host)


@contextlib.contextmanager
def hub_or_cache() -> Iterator[str]:
    """Within, what is fetched comes from the Hub, or where that cannot be reached at once from the cache.

    Yields `why_unreachable`. Import the Hub's libraries before: they look only then into the environment.
    """
    reason = why_unreachable()
    modules = [sys.modules[name] for name in _SWITCHES if reason and name in sys.modules]
    before = [module.HF_HUB_OFFLINE for module in modules]
    for module in modules:
        module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
    try:
        yield reason
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
