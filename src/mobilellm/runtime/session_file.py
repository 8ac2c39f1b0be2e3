"""A session in a file: the tokens that were read, and the keys and values that came of it.

A .safetensors file: `tokens` int32 (tokens), `keys` and `values` as a CacheState has them; its metadata hold
the fingerprint of the model and the SHA-256 of the three.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm.atomic import atomic_write
from mobilellm.runtime.kv_cache import KV_CACHE_TYPES, CacheState, KVCacheType, number_type

_FORMAT = "mobilellm session 1"
_NAMES = ("tokens", *CacheState._fields)


def write_session(path: str | Path, model: str, tokens: list[int], state: CacheState) -> None:
    """The file appears whole or not at all. `model` is the fingerprint of the model that read the tokens."""
    from safetensors.numpy import save_file

    arrays = {"tokens": np.array(tokens, np.int32), **state._asdict()}
    with atomic_write(path) as temporary:
        save_file(arrays, temporary, {"format": _FORMAT, "model": model, "sha256": _digest(arrays)})


def read_session(path: str | Path, model: str, kv_cache: KVCacheType) -> tuple[list[int], CacheState]:
    """Raises FileNotFoundError, or ValueError with one line: damaged, of another model, of another cache."""
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a directory; name a session file")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such session file")
    try:
        with safe_open(path, framework="numpy") as file:
            said = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - is no dict
    except (SafetensorError, TypeError) as error:  # TypeError: numbers that numpy does not have
        raise ValueError(f"{path}: is no session file, or cut off ({error}); save the session anew") from None
    if said.get("format") != _FORMAT:
        raise ValueError(f"{path}: is no session file of this version; save the session anew")
    if said.get("model") != model:
        raise ValueError(f"{path}: was saved with another model than this one; save a session of its own")
    types = {name: array.dtype for name, array in arrays.items()}
    kind = next((kind for kind in KV_CACHE_TYPES if types == _types(kind)), None)
    if kind is None or said.get("sha256") != _digest(arrays):
        raise ValueError(
            f"{path}: is damaged: its numbers are not those that were saved; save the session anew"
        )
    if kind != kv_cache:
        raise ValueError(
            f"{path}: was saved with keys and values in {kind}, and this model keeps them in {kv_cache}; "
            f"load it with kv_cache = {kind!r} (--kv-cache {kind}), or save a session of its own"
        )
    tokens, state = arrays["tokens"], CacheState(arrays["keys"], arrays["values"])
    if tokens.ndim != 1 or state.keys.shape[1:2] != tokens.shape:
        raise ValueError(f"{path}: is damaged: {tokens.shape} tokens, {state.keys.shape} keys")
    return tokens.tolist(), state


def _types(kind: KVCacheType) -> dict[str, np.dtype[Any]]:
    numbers = np.dtype(number_type(kind))
    return dict(zip(_NAMES, (np.dtype(np.int32), numbers, numbers), strict=True))


def _digest(arrays: dict[str, NDArray[np.generic]]) -> str:
    import hashlib

    digest = hashlib.sha256()
    for name in _NAMES:
        digest.update(repr(arrays[name].shape).encode())
        digest.update(np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()
