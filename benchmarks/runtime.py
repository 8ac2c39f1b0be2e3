"""Speed of the native engine: decoding, prefill, loading, memory, beside this machine's own read bandwidth.

    python benchmarks/runtime.py --json docs/results/runtime.json
    python benchmarks/runtime.py --models 125m:Q4_0 --peers        # transformers and, if installed, llama.cpp

Random weights of the presets' shapes, which take as long as trained ones. Decoding is timed in rounds, with
a reading of memory by the same threads between them, and peers take turns with us, so that what else the
machine does falls on all alike; medians and the best are given. Tokens are one at a time after a prompt of
64; prefill is 512 tokens at once. Peak memory and the time to the first token are those of new processes.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np

from mobilellm import gguf_model
from mobilellm.data.documents import python_documentation
from mobilellm.gguf_blocks import TYPES
from mobilellm.gguf_model import Roles, layout
from mobilellm.presets import preset
from mobilellm.runtime import engine
from mobilellm.tokenizer import Tokenizer

PROMPT, DECODED, PREFILLED = 64, 16, 512
PEAK = "import re; print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
FIRST_TOKEN = f"""
import sys
import mobilellm.runtime
model = mobilellm.runtime.load(sys.argv[1], engine="native")
print(model.generate("The quick brown fox", max_new_tokens=1)[0].tokens)
{PEAK}
"""
IMPORTS = f"import mobilellm.runtime.session; {PEAK}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--models", nargs="+", default=["125m:Q8_0", "125m:Q4_0", "ls-125m:Q8_0", "ls-125m:Q4_0"]
    )
    parser.add_argument("--threads", type=int, default=engine.default_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"threads": arguments.threads, "rounds": arguments.rounds, "models": {}}
    with tempfile.TemporaryDirectory() as folder:
        for named in arguments.models:
            shape, kind = named.split(":")
            file = _write_model(Path(folder) / f"{shape}-{kind}.gguf", shape, kind)
            results["models"][named] = _measure(file, arguments.threads, arguments.rounds)
            if arguments.peers:
                results["models"][named] |= _peers(file, shape, arguments.threads, arguments.rounds)
            print(named, results["models"][named], file=sys.stderr)
    machine.write(arguments.json, results)


def _write_model(file: Path, shape: str, kind: str) -> Path:
    config = preset(shape)
    text = [document.text for document, _ in zip(python_documentation(), range(70), strict=False)]
    shapes = {name: stored.shape for name, stored in layout(config, Roles(TYPES["F32"], TYPES["F32"]))}

    def weight(name: str) -> np.ndarray:
        random = np.random.default_rng(zlib.crc32(name.encode()))
        its_shape = shapes[name]
        if len(its_shape) == 1:
            return np.ones(its_shape, np.float32)
        return random.standard_normal(its_shape, np.float32) * np.float32(its_shape[-1] ** -0.5)

    roles = Roles(TYPES[kind], TYPES[kind])
    gguf_model.write_model(file, config, weight, Tokenizer.train(text, 2048), roles, shape)
    return file


def _measure(file: Path, threads: int, rounds: int) -> dict[str, Any]:
    loading = []
    for _ in range(3):
        start = time.perf_counter()
        model = engine.load(file, threads)
        loading.append(time.perf_counter() - start)
    tokens = np.arange(PREFILLED) % 1000 + 300
    elsewhere = np.ones(2**25, np.uint64)
    token, bandwidth, prefill = [], [], []
    for _ in range(rounds):
        start = time.perf_counter()
        model.forward(tokens, model.new_cache(PREFILLED))
        prefill.append(PREFILLED / (time.perf_counter() - start))
        cache = model.new_cache(PROMPT + DECODED)
        model.forward(tokens[:PROMPT], cache)
        for _ in range(DECODED):
            start = time.perf_counter()
            model.logits(model.forward(np.array([500]), cache))
            token.append(time.perf_counter() - start)
        start = time.perf_counter()
        model.read_memory(elsewhere)
        bandwidth.append(elsewhere.nbytes / (time.perf_counter() - start))
    read = [model.arena_bytes / seconds for seconds in token]  # a shared block's repeats are not counted
    config = model.config
    starts = [_first_token(file) for _ in range(3)]
    kept = (2 * config.num_steps * config.num_kv_heads * config.head_dim * 2) * config.max_position_embeddings
    return {
        "isa": model.isa,
        "decode_tokens_per_second": _spread([1 / seconds for seconds in token]),
        "read_gb_per_second": _spread([each / 1e9 for each in read]),
        "memory_gb_per_second": _spread([each / 1e9 for each in bandwidth]),
        "share_of_bandwidth": round(statistics.median(read) / statistics.median(bandwidth), 3),
        "prefill_tokens_per_second": _spread(prefill),
        "load_seconds": round(statistics.median(loading), 3),
        "first_token_seconds": round(statistics.median(seconds for seconds, _ in starts), 3),
        "peak_megabytes": round(max(peak for _, peak in starts) / 1e6, 1),
        "of_these_python": round(int(_run(IMPORTS, file)[-1]) * 1024 / 1e6, 1),
        "file_megabytes": round(file.stat().st_size / 1e6, 1),
        "cache_of_full_context_megabytes": round(kept / 1e6, 1),
    }


def _first_token(file: Path) -> tuple[float, int]:
    """Seconds from the start of Python to its end, and bytes of memory at most."""
    start = time.perf_counter()
    said = _run(FIRST_TOKEN, file)
    return time.perf_counter() - start, int(said[-1]) * 1024


def _run(code: str, file: Path) -> list[str]:
    command = [sys.executable, "-c", code, str(file)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 1), "best": round(max(values), 1)}


def _peers(file: Path, shape: str, threads: int, rounds: int) -> dict[str, Any]:
    """Seconds of prompt and `DECODED` tokens, ours and theirs in turns, as ratios of medians."""
    runs: dict[str, Callable[[], None]] = {"ours": _ours(file, threads)}
    if not preset(shape).shares_layers:
        runs |= _transformers(shape, threads) | _llama_cpp(file, threads)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    ours = statistics.median(seconds["ours"])
    return {
        "times_faster_than": {
            name: round(statistics.median(its) / ours, 2) for name, its in seconds.items() if name != "ours"
        }
    }


def _ours(file: Path, threads: int) -> Callable[[], None]:
    model = engine.load(file, threads)

    def run() -> None:
        cache = model.new_cache(PROMPT + DECODED)
        logits = model.logits(model.forward(np.arange(300, 300 + PROMPT), cache)[-1:])
        for _ in range(DECODED - 1):
            logits = model.logits(model.forward(logits[0].argmax(keepdims=True), cache))

    return run


def _transformers(shape: str, threads: int) -> dict[str, Callable[[], None]]:
    try:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        return {}
    torch.set_num_threads(threads)
    config = preset(shape)
    theirs = LlamaConfig(
        vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads, num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim, tie_word_embeddings=config.tie_word_embeddings, eos_token_id=None,
    )  # fmt: skip
    prompt = torch.arange(300, 300 + PROMPT)[None]

    def generate(dtype: torch.dtype) -> Callable[[], None]:
        model = LlamaForCausalLM(theirs).to(dtype).eval()

        def run() -> None:
            with torch.inference_mode():
                model.generate(prompt, max_new_tokens=DECODED, do_sample=False, pad_token_id=0)

        return run

    return {
        f"transformers {name}": generate(dtype)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }


def _llama_cpp(file: Path, threads: int) -> dict[str, Callable[[], None]]:
    try:
        import llama_cpp
    except ImportError:
        return {}
    model = llama_cpp.Llama(
        str(file), n_ctx=PREFILLED, n_threads=threads, n_threads_batch=threads, verbose=False
    )

    def run() -> None:
        model.reset()
        model.eval(list(range(300, 300 + PROMPT)))
        for _ in range(DECODED - 1):
            model.eval([model.sample(temp=0.0)])

    return {"llama.cpp": run}


if __name__ == "__main__":
    main()
