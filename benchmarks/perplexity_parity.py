"""Perplexity of one model by every way to run its .gguf file: the engine, the definition, PyTorch, llama.cpp.

    python benchmarks/perplexity_parity.py MODEL --json docs/results/perplexity-parity.json

MODEL is a model directory, or a preset for random weights. Per type of the file: nats a token of the first
windows by the reference protocol. The engine and the definition (runtime/reference.py) compute the same;
PyTorch multiplies the very numbers that are in the file, in float32, with inputs that are not rounded to
8 bits; llama.cpp, where it is installed, has a rounding of its own and gets a shared model unrolled.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import machine
import numpy as np

import mobilellm
import mobilellm.runtime
from mobilellm import gguf_model
from mobilellm.bench.entries import write_directory, write_unrolled
from mobilellm.eval import protocols
from mobilellm.eval.interface import LanguageModel
from mobilellm.eval.models import open_model
from mobilellm.eval.protocols import Unit
from mobilellm.eval.runtime_model import GgufModel
from mobilellm.eval.texts import joined_rows, read_text
from mobilellm.gguf import read_gguf
from mobilellm.gguf_blocks import TYPES
from mobilellm.gguf_model import Roles
from mobilellm.installation import missing_packages
from mobilellm.presets import preset_names
from mobilellm.runtime.random_model import write_random_model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", default="wikitext2", help="a text file, or wikitext2 from the Hub")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--types", nargs="+", default=list(TYPES))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    content = joined_rows(read_text(arguments.data))
    results: dict[str, Any] = {"model": Path(arguments.model).name, "windows": arguments.windows}
    for kind in arguments.types:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            _write(arguments.model, file, kind)
            results[kind] = _measure(file, content, arguments.windows)
            print(kind, results[kind], file=sys.stderr, flush=True)
    machine.write(arguments.json, results)


def _write(model: str, file: Path, kind: str) -> None:
    if model in preset_names():
        write_random_model(file, model, kind)
        return
    loaded = mobilellm.load(model)
    named = dict(loaded.model.named_parameters())
    assert loaded.tokenizer is not None

    def weight(name: str) -> np.ndarray:
        return named[name].detach().float().numpy()

    gguf_model.write_model(
        file, loaded.model.config, weight, loaded.tokenizer, Roles(TYPES[kind], TYPES[kind]), "model"
    )


def _measure(file: Path, content: str, windows: int) -> dict[str, Any]:
    engine = GgufModel(mobilellm.runtime.load(file, engine="native"), file)
    units = protocols.reference(engine, content, min(engine.context, protocols.REFERENCE_WINDOW))[:windows]
    write_directory(file, file.parent / "directory", "float32")
    ways: dict[str, Callable[[], float]] = {
        "engine": lambda: _nats(engine, units),
        "definition": lambda: _nats(GgufModel(mobilellm.runtime.load(file, engine="reference"), file), units),
        "torch": lambda: _nats(open_model(file.parent / "directory"), units),
    }
    if not missing_packages("llama_cpp"):
        ways["llama.cpp"] = lambda: _nats_of_llama_cpp(file, units)
    nats = {name: run() for name, run in ways.items()}
    return {
        "tokens": sum(len(request.continuation) for unit in units for request in unit.requests),
        "perplexity": {name: round(float(np.exp(each)), 5) for name, each in nats.items()},
        "engine_over": {
            name: float(f"{np.expm1(nats['engine'] - each):.3g}")
            for name, each in nats.items()
            if name != "engine"
        },
    }


def _nats(model: LanguageModel, units: list[Unit]) -> float:
    """Of a token."""
    return float(np.log(protocols.score(model, units)[0]["token_perplexity"]))


def _nats_of_llama_cpp(file: Path, units: list[Unit]) -> float:
    import llama_cpp

    if gguf_model.read_config(read_gguf(file)).shares_layers:
        unrolled = file.with_name("unrolled.gguf")
        write_unrolled(file, unrolled)
        file = unrolled
    longest = max(len(context) + len(wanted) for unit in units for context, wanted in unit.requests)
    model = llama_cpp.Llama(str(file), n_ctx=longest, logits_all=True, verbose=False)
    total, count = 0.0, 0
    for unit in units:
        for context, wanted in unit.requests:
            model.reset()
            model.eval([*context, *wanted][:-1])
            logits = np.array(model.scores[: model.n_tokens][-len(wanted) :], np.float64)
            highest = logits.max(axis=1)
            normal = np.log(np.exp(logits - highest[:, None]).sum(axis=1)) + highest
            total += float((normal - logits[np.arange(len(wanted)), list(wanted)]).sum())
            count += len(wanted)
    return total / count


if __name__ == "__main__":
    main()
