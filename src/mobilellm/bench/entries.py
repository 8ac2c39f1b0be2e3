"""What `mobilellm bench` is told to measure, and the same weights as each contestant reads them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mobilellm import gguf_model, gguf_tokenizer, hub
from mobilellm.bench.contestant import KINDS, RUNTIME, kv_cache_of
from mobilellm.gguf import read_gguf
from mobilellm.gguf_model import Roles
from mobilellm.installation import missing_packages
from mobilellm.model_directory import read_config_file
from mobilellm.runtime.bench import describe
from mobilellm.runtime.kv_cache import KVCacheType
from mobilellm.runtime.random_model import shape_and_type, write_random_model

_ARTEFACTS = {"model.pte": "executorch", "genai_config.json": "onnx"}
"""A file in a directory that mobilellm export wrote -> what runs it."""


@dataclass(frozen=True)
class Entry:
    """One contestant with one model."""

    model: str
    """As it was called on the command line."""
    kind: str
    source: Path
    remark: str = ""
    """What differs between the model and `source`."""

    @cached_property
    def described(self) -> dict[str, Any]:
        """What the file tells of itself; a directory's contestant tells it."""
        return describe(self.source, kv_cache_of(self.kind)) if self.source.suffix == ".gguf" else {}

    @property
    def context(self) -> int:
        """Most tokens of a sequence."""
        if self.described:
            return int(self.described["context"])
        if self.kind in _ARTEFACTS.values():
            tokenizer = json.loads((self.source / "tokenizer_config.json").read_text(encoding="utf-8"))
            return int(tokenizer["model_max_length"])
        return read_config_file(self.source).config.max_position_embeddings

    @property
    def runtime(self) -> str:
        """Its name."""
        return KINDS[self.kind].label

    @property
    def label(self) -> str:
        """The runtime and the remark."""
        return self.runtime + (f", {self.remark}" if self.remark else "")

    @property
    def is_ours(self) -> bool:
        """Run by this package itself."""
        return self.kind in (*RUNTIME.values(), "torch")


def entries(
    models: Sequence[str],
    peers: Sequence[str],
    folder: Path,
    say: Callable[[str], None],
    kv_caches: Sequence[KVCacheType] = ("f16",),
) -> list[Entry]:
    """Who is measured with what. Files that have to be made lie in `folder`, and `say` is told of each.

    A model is a .gguf file, SHAPE:TYPE for random weights, a model directory, or one for ExecuTorch or
    onnxruntime. A .gguf file is measured with each of `kv_caches`. Raises ValueError and FileNotFoundError
    for what is none of them, and ModuleNotFoundError where its runtime is not installed.
    """
    if not kv_caches or len(set(kv_caches)) < len(kv_caches):
        raise ValueError(f"kv_cache = {' '.join(kv_caches) or 'nothing'}: name each type once")
    found = []
    for number, model in enumerate(models):
        made = folder / str(number)
        made.mkdir()
        source = _source(model, made, say)
        if source.suffix == ".gguf":
            found += [Entry(model, RUNTIME[kv_cache], source) for kv_cache in kv_caches]
            found += _of_peers(peers, model, source, made, say)
        elif tuple(kv_caches) != ("f16",):
            raise ValueError(f"kv_cache = {' '.join(kv_caches)} is for .gguf files; {model} is none")
        elif artefact := next((_ARTEFACTS[name] for name in _ARTEFACTS if (source / name).is_file()), None):
            for package in missing_packages(*KINDS[artefact].packages):
                raise ModuleNotFoundError(f"no module named {package!r}", name=package)
            found.append(Entry(model, artefact, source))
        else:
            found.append(Entry(model, "torch", source))
            found += [Entry(model, peer, source) for peer in peers if KINDS[peer].reads == "directory"]
    return found


def _source(model: str, folder: Path, say: Callable[[str], None]) -> Path:
    path = Path(model)
    if path.suffix == ".gguf":
        if not path.exists():
            raise FileNotFoundError(f"{model}: no such file")
        return path
    if path.is_dir():
        return hub.resolve(model, say)  # of a run its model
    if path.exists():
        raise ValueError(
            f"{model}: is no .gguf file; name one, a model directory, or a shape such as 125m:Q8_0"
        )
    shape, kind = shape_and_type(model)
    file = folder / f"{shape}-{kind}.gguf"
    say(f"writing {model} with random weights")
    write_random_model(file, shape, kind)
    return file


def _of_peers(
    peers: Sequence[str], model: str, source: Path, folder: Path, say: Callable[[str], None]
) -> list[Entry]:
    """The weights of a .gguf file as the peers read them; made once for all that read the same."""
    found, remark, plain, directory = [], "", source, folder / "directory"
    if peers and gguf_model.read_config(read_gguf(source)).shares_layers:
        say(f"{model} shares blocks, which no other runtime reads: it is written unrolled for them")
        remark, plain = "unrolled", folder / "unrolled.gguf"
        write_unrolled(source, plain)
    for peer in peers:
        if KINDS[peer].reads == "unrolled":
            found.append(Entry(model, peer, plain, remark))
            continue
        if not directory.exists():
            say(f"writing {model} as a model directory for {KINDS[peer].label}")
            dtype = write_directory(plain, directory)
        found.append(Entry(model, peer, directory, ", ".join(filter(None, [remark, dtype]))))
    return found


def write_unrolled(source: Path, target: Path) -> None:
    """A .gguf file whose shared blocks are there once for every time they run, with the same bytes.

    Raises ValueError where that cannot be: then the file was written with another rounding than ours.
    """
    file = read_gguf(source)
    config = gguf_model.read_config(file)

    def shared(name: str) -> str:
        return re.sub(r"(?<=layers\.)\d+", lambda step: str(config.schedule[int(step[0])]), name)

    def weight(name: str) -> NDArray[np.float32]:
        return gguf_model.read_weight(file, config, name)

    roles = Roles(file.tensors["blk.0.attn_q.weight"].type, file.tensors["token_embd.weight"].type)
    gguf_model.write_model(
        target, config.unrolled(), lambda name: weight(shared(name)), gguf_tokenizer.read_tokenizer(file),
        roles, source.stem, gguf_tokenizer.read_chat_template(file),
    )  # fmt: skip
    written = read_gguf(target)
    for name in written.tensors:
        stored = re.sub(r"(?<=blk\.)\d+", lambda step: str(config.schedule[int(step[0])]), name)
        if not np.array_equal(written.raw(name), file.raw(stored)):
            raise ValueError(
                f"{source}: {stored!r} cannot be written again bit for bit; make the other file with "
                "mobilellm export --unroll, and measure that"
            )


def write_directory(source: Path, directory: Path, dtype: str | None = None) -> str:
    """A .gguf file's weights as a model directory, in `dtype`, which is returned.

    By default bfloat16 where this processor multiplies in it, else float32; a float32 file stays so.
    """
    import torch

    from mobilellm.model import checkpoint
    from mobilellm.model.products import has_bfloat16
    from mobilellm.model.transformer import MobileLLM

    file = read_gguf(source)
    config = gguf_model.read_config(file)
    if dtype is None:
        is_float32 = file.tensors["blk.0.attn_q.weight"].type.name == "F32"
        dtype = "float32" if is_float32 or not has_bfloat16() else "bfloat16"
    with torch.device("meta"):
        model = MobileLLM(config)
    weights = {
        name: torch.tensor(gguf_model.read_weight(file, config, name), dtype=checkpoint.torch_dtype(dtype))
        for name, _ in model.named_parameters()
    }
    model.load_state_dict(weights, assign=True)
    checkpoint.save(directory, model, gguf_tokenizer.read_tokenizer(file))
    return dtype
