"""Starts from nothing: a new process imports, loads a model, writes one token of text, fills a sequence.

    python -m mobilellm.bench.cold_start KIND SOURCE THREADS CONTEXT BEGIN

is one such process, and BEGIN the moment (time.monotonic) when it was asked for. It prints one JSON object:
seconds since then and most memory so far, after each of the four steps. Every runtime is used as its own
documentation shows it.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what is imported here counts as the start
    from mobilellm.runtime.kv_cache import KVCacheType

PROMPT = "The quick brown fox"
STEPS = ("import", "load", "first_token", "full")


def main() -> None:
    kind, source, threads, context, begin = sys.argv[1:]
    steps = _STARTS[kind](source, int(threads), int(context))
    seconds, peaks = [], []
    for _ in STEPS:
        next(steps)
        seconds.append(time.monotonic() - float(begin))
        peaks.append(peak_bytes())
    print(json.dumps({"seconds": seconds, "peak_bytes": peaks}))


def peak_bytes() -> int:
    """Most memory this process has held: resident, mapped files that were read included."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found
    return int(found[1]) * 1024


def _runtime(source: str, threads: int, context: int, kv_cache: KVCacheType = "f16") -> Iterator[None]:
    from mobilellm.runtime import session

    yield
    model = session.load(source, threads, engine="native", kv_cache=kv_cache)
    yield
    model.generate(PROMPT, max_new_tokens=1)
    yield
    list(model.generate_tokens([_ids(context, model.engine.config.vocab_size)], max_new_tokens=1))
    yield


def _torch(source: str, threads: int, context: int) -> Iterator[None]:
    import torch

    from mobilellm.model import api

    torch.set_num_threads(threads)
    yield
    loaded = api.load(source)
    yield
    api.generate(loaded, PROMPT, max_new_tokens=1)
    yield
    from mobilellm.model.generate import generate_tokens

    list(generate_tokens(loaded.model, [_ids(context, loaded.model.config.vocab_size)], max_new_tokens=1))
    yield


def _llama_cpp(source: str, threads: int, context: int) -> Iterator[None]:
    from llama_cpp import Llama

    yield
    model = Llama(source, n_ctx=context, n_threads=threads, n_threads_batch=threads, verbose=False)
    yield
    model.create_completion(PROMPT, max_tokens=1, temperature=0.0)
    yield
    model.reset()
    model.eval(_ids(context, model.n_vocab()))
    yield


def _transformers(source: str, threads: int, context: int) -> Iterator[None]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    yield
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    yield
    model.generate(**tokenizer(PROMPT, return_tensors="pt"), max_new_tokens=1, do_sample=False)
    yield
    with torch.inference_mode():
        model(torch.tensor([_ids(context, model.config.vocab_size)]), use_cache=True, logits_to_keep=1)
    yield


def _executorch(source: str, threads: int, context: int) -> Iterator[None]:
    from executorch.extension.pybindings import portable_lib

    from mobilellm.artefacts.executorch_engine import ExecutorchModel
    from mobilellm.artefacts.opening import PROGRAM

    portable_lib._unsafe_reset_threadpool(threads)
    return _artefact(source, context, lambda: ExecutorchModel(Path(source) / PROGRAM))


def _onnx(source: str, threads: int, context: int) -> Iterator[None]:
    import onnxruntime  # noqa: F401  # counts as import, not as loading

    from mobilellm.artefacts.onnx_engine import OnnxModel

    return _artefact(source, context, lambda: OnnxModel(Path(source), threads))


def _artefact(source: str, context: int, load: Callable[[], Any]) -> Iterator[None]:
    from mobilellm.runtime.session import RuntimeModel
    from mobilellm.tokenizer import Tokenizer

    yield
    model = RuntimeModel(load(), Tokenizer.load(source), source, None)
    yield
    model.generate(PROMPT, max_new_tokens=1)
    yield
    list(model.generate_tokens([_ids(context, model.engine.config.vocab_size)], max_new_tokens=1))
    yield


_STARTS: dict[str, Callable[[str, int, int], Iterator[None]]] = {
    "runtime": _runtime,
    "runtime q8_0": partial(_runtime, kv_cache="q8_0"),
    "torch": _torch,
    "llama.cpp": _llama_cpp,
    "transformers": _transformers,
    "executorch": _executorch,
    "onnx": _onnx,
}


def _ids(context: int, vocabulary: int) -> list[int]:
    """One fewer than the sequence holds, so that the token that is drawn has room."""
    from mobilellm.runtime.bench import fed_tokens

    return [int(token) for token in fed_tokens(context - 1, vocabulary)]


if __name__ == "__main__":
    main()
