"""Flags of several verbs about how a .gguf file is run."""

from __future__ import annotations

from typing import Annotated

import tyro

from mobilellm.runtime.kv_cache import KVCacheType

Threads = Annotated[
    int | None,
    tyro.conf.arg(help="Of a .gguf file: always so many. By default what measures best while it runs."),
]
KVCache = Annotated[
    KVCacheType,
    tyro.conf.arg(
        help="Of a .gguf file: type of keys and values; q8_0 takes half the memory, less time in long texts."
    ),
]
