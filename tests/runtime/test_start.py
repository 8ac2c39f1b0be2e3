"""A start from nothing brings in what a first token needs and little else, and takes little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from mobilellm import gguf_model
from mobilellm.gguf_blocks import TYPES
from mobilellm.gguf_model import Roles
from mobilellm.presets import preset
from mobilellm.runtime import engine
from mobilellm.runtime.kv_cache import bytes_per_token
from mobilellm.runtime.random_model import made_tokenizer, random_weights

if (fault := engine.missing()) is not None:
    pytest.skip(f"the native engine was not compiled: {fault}", allow_module_level=True)
if not Path("/proc/self/status").exists():
    pytest.skip("needs Linux to tell what memory a process took", allow_module_level=True)

CONTEXT = 512
CONFIG = replace(preset("test"), vocab_size=32_000, max_position_embeddings=CONTEXT)
NEEDED_ANYWAY = "import ctypes, dataclasses, mmap, pathlib, threading, numpy.typing"
HEAVY = {
    "_hashlib", "_ssl", "asyncio", "email", "hashlib", "importlib.resources", "json", "logging", "lzma",
    "numpy.random", "random", "secrets", "shutil", "subprocess", "tempfile", "zipfile", "tokenizers", "gguf",
    "mobilellm.compiling", "mobilellm.runtime.reference",
}  # fmt: skip


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with a vocabulary as large as those of real ones."""
    path = tmp_path_factory.mktemp("start") / "m.gguf"
    roles = Roles(TYPES["Q8_0"], TYPES["Q8_0"])
    gguf_model.write_model(
        path, CONFIG, random_weights(CONFIG), made_tokenizer(CONFIG.vocab_size), roles, "m"
    )
    return path


def printed(*arguments: str) -> str:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=100, check=True
    ).stdout


def test_a_first_token_needs_neither_openssl_nor_other_heavy_modules(file: Path) -> None:
    """What Python's own ctypes or numpy brings in, in whatever version, does not count."""
    code = f"""
{NEEDED_ANYWAY}
import sys
before = set(sys.modules)
import mobilellm.runtime
model = mobilellm.runtime.load({str(file)!r}, engine="native")
assert len(model.generate("some words", max_new_tokens=1)[0].tokens) == 1
print(*set(sys.modules) - before)
"""
    loaded = set(printed("-c", code).split())
    assert "mobilellm.runtime.engine" in loaded
    assert not HEAVY & loaded


def test_a_model_takes_little_memory_beside_file_cache_python_and_numpy(file: Path) -> None:
    """7 MB here, where it was 19: OpenSSL, a vocabulary of Python's strings, the file's pages for embeddings."""
    peak = f"{NEEDED_ANYWAY}\nfrom mobilellm.bench.cold_start import peak_bytes\nprint(peak_bytes())"
    python = int(printed("-c", peak))
    start = (
        "-m",
        "mobilellm.bench.cold_start",
        "runtime",
        str(file),
        "2",
        str(CONTEXT),
        str(time.monotonic()),
    )
    *_, full = json.loads(printed(*start))["peak_bytes"]
    cache = CONTEXT * bytes_per_token("f16", CONFIG)
    assert 0 < full - python - file.stat().st_size - cache < 13e6
