"""What the machine may lack: memory, threads, instructions. And what shares a file: processes and threads."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from gguf_files import SHAPE, exported

import mobilellm.runtime
from mobilellm.runtime import engine

if (fault := engine.missing()) is not None:
    pytest.skip(f"the native engine was not compiled: {fault}", allow_module_level=True)

IN_LITTLE_MEMORY = """
import resource, sys
import numpy as np
from pathlib import Path
from mobilellm.gguf import read_gguf
from mobilellm.runtime import engine

def leave(room):
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + room, resource.RLIM_INFINITY))

def attempt(room, action):
    leave(room)
    try:
        action()
        said = "done"
    except (ValueError, MemoryError) as error:
        said = f"{type(error).__name__}: {error}"
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(said)

file = read_gguf(sys.argv[1])
model = engine.NativeModel(file, 1)
tokens = np.arange(3, 259)
right = engine.NativeModel(file, 1)
right = right.forward(tokens, right.new_cache(300))
attempt(2**20, lambda: engine.NativeModel(file, 1))
attempt(2**20, lambda: engine.NativeModel(file, 3))
attempt(2**20, lambda: model.new_cache(2**20))
cache = model.new_cache(300)
model.forward(tokens[:1], cache)
cache.truncate(0)
for room in range(2**18, 2**23, 2**18):
    attempt(room, lambda: model.forward(tokens, cache))
    if cache.length:
        break
cache.truncate(0)
print(np.array_equal(model.forward(tokens, cache), right))
"""


def test_no_memory_is_said_and_what_was_open_goes_on(tmp_path: Path) -> None:
    file, _ = exported(
        tmp_path, "Q8_0", replace(SHAPE, intermediate_size=4096, max_position_embeddings=2**20)
    )
    done = subprocess.run(
        [sys.executable, "-c", IN_LITTLE_MEMORY, str(file)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    model, threads, cache, *batches, right = done.stdout.splitlines()
    assert model == f"ValueError: {file}: there is not enough memory for the model"
    assert threads.startswith(f"ValueError: {file}: 3 threads could not be started")
    assert cache == "MemoryError: there is no memory for a cache of 1048576 tokens; ask for fewer"
    assert batches[0].startswith("MemoryError: the native engine found no memory for this batch")
    assert batches[-1] == "done"
    assert right == "True"


def test_instructions_that_the_processor_lacks_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No processor has those of both families."""
    file, _ = exported(tmp_path, "Q8_0")
    best = engine.load(file, 1).isa
    lacking = "avx2" if best in ("neon", "dotprod") else "neon"
    monkeypatch.setenv(engine.ISA_VARIABLE, lacking)
    with pytest.raises(ValueError, match=f"this build, has no {lacking}; the best it has is {best}"):
        mobilellm.runtime.load(file)


GENERATE = """
import sys, mobilellm.runtime
model = mobilellm.runtime.load(sys.argv[1], threads=2)
print(*model.generate("some words", max_new_tokens=60)[0].tokens)
"""


def test_processes_and_threads_use_one_file(tmp_path: Path) -> None:
    file, _ = exported(tmp_path, "Q8_0")
    processes = [
        subprocess.Popen([sys.executable, "-c", GENERATE, str(file)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    tokens: list[tuple[int, ...]] = []

    def generate() -> None:
        model = mobilellm.runtime.load(file, threads=2)
        tokens.extend(tuple(model.generate("some words", max_new_tokens=60)[0].tokens) for _ in range(3))

    threads = [threading.Thread(target=generate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    said = [tuple(map(int, process.communicate(timeout=300)[0].split())) for process in processes]
    assert len(tokens) == 9
    assert len(tokens[0]) > 5
    assert set(tokens) == set(said)
    assert np.min(tokens[0]) >= 0
