"""Two packages of the npm registry: transformers.js, and the WebAssembly of onnxruntime it was built for."""

from __future__ import annotations

import base64
import hashlib
import http.client
import io
import os
import tarfile
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mobilellm.atomic import atomic_write
from mobilellm.user_cache import user_cache

Progress = Callable[[str, int, int], None]
"""Told what is fetched, and how many bytes of how many are there."""

_REGISTRY = "https://registry.npmjs.org"
_TIMEOUT = 60.0
_PIECE = 1 << 18


@dataclass(frozen=True)
class Package:
    name: str
    version: str
    integrity: str
    """As a package-lock.json has it: sha512-, then the digest of the archive in base64."""
    licence: str
    files: dict[str, str]
    """A path in the archive -> the name of the file in the folder."""

    @property
    def archive(self) -> str:
        return f"{self.name.rpartition('/')[2]}-{self.version}.tgz"


TRANSFORMERS = Package(
    "@huggingface/transformers",
    "4.3.1",
    "sha512-5+voSeUCFK6PCKlY15dPhNOKq3/zOTxDN7oC+Wy9dFb1QZ0TSQomZRRy7URRK8YRuUoE9fGMQTTPC5d/pWBJhA==",
    "Apache-2.0",
    {"dist/transformers.min.js": "transformers.min.js", "LICENSE": "transformers.LICENSE.txt"},
)
ONNXRUNTIME = Package(  # the very version in transformers.min.js
    "onnxruntime-web",
    "1.31.0-dev.20260914-8d85527a0",
    "sha512-Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
    "MIT",
    {
        "dist/ort-wasm-simd-threaded.mjs": "ort-wasm-simd-threaded.mjs",
        "dist/ort-wasm-simd-threaded.wasm": "ort-wasm-simd-threaded.wasm",
    },
)


def files_of(package: Package, progress: Progress = lambda what, done, total: None) -> dict[str, bytes]:
    """The package's files by their names in the folder, fetched once and then kept in the user's cache.

    Raises ConnectionError where the registry cannot be reached, ValueError for an archive that is not the
    pinned one; each with one line.
    """
    cached = user_cache() / "npm" / package.archive
    if cached.is_file() and _is_pinned(package, content := cached.read_bytes()):
        return _unpacked(package, content)
    content = _fetched(package, cached, progress)
    with atomic_write(cached) as temporary:
        temporary.write_bytes(content)
    return _unpacked(package, content)


def _fetched(package: Package, cached: Path, progress: Progress) -> bytes:
    registry = os.environ.get("NPM_CONFIG_REGISTRY") or _REGISTRY
    address = f"{registry.rstrip('/')}/{package.name}/-/{package.archive}"
    content = io.BytesIO()
    try:
        with urllib.request.urlopen(address, timeout=_TIMEOUT) as response:
            total = int(response.headers.get("Content-Length") or 0)
            while piece := response.read(_PIECE):
                content.write(piece)
                progress(f"fetching {package.name}", content.tell(), total)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ConnectionError(
            f"{address}: cannot be fetched ({error}); it is needed once, and kept as {cached} afterwards"
        ) from None
    if not _is_pinned(package, content.getvalue()):
        raise ValueError(f"{address}: is not the archive that is pinned here (its SHA-512 differs); not used")
    return content.getvalue()


def _is_pinned(package: Package, content: bytes) -> bool:
    digest = base64.b64encode(hashlib.sha512(content).digest()).decode()
    return f"sha512-{digest}" == package.integrity


def _unpacked(package: Package, content: bytes) -> dict[str, bytes]:
    """Read in memory: nothing of an archive's own paths reaches the disk."""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        found = {}
        for path, name in package.files.items():
            member = archive.extractfile(f"package/{path}")
            assert member is not None  # the archive is the pinned one
            found[name] = member.read()
    return found
