"""The kinds of artefact: what each is called, needs and takes, and what its module must give.

A target's module holds one object `TARGET`, a `Target`. It writes an artefact, says what has to be in it, and
reads back and runs what is in it; export.py and verify.py do the rest, the same for every target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from mobilellm.atomic import made_of
from mobilellm.installation import install_command, missing_packages
from mobilellm.model_directory import not_a_model_directory

if TYPE_CHECKING:
    from mobilellm.config import ModelConfig
    from mobilellm.export.check import Check
    from mobilellm.export.questions import Floats, Runtime
    from mobilellm.export.source import Source

UNVERIFIED = ".unverified"
"""Ends the name of an artefact that was not compared with its source, or failed."""


@dataclass(frozen=True)
class Options:
    """What can be chosen about an artefact. A target refuses what it does not take."""

    type: str | None = None
    """How matrices are stored. gguf: f32, f16, bf16, q8_0 (default), q4_0; hf: float32, bfloat16, float16,
    by default as in the source; onnx, executorch: fp32, int8, int4 (default)."""
    embedding_type: str | None = None
    """How embedding and head are stored. gguf, onnx: by default as the rest; executorch: int8."""
    context: int | None = None
    """executorch: most tokens of a text, for which memory is planned; by default the model's context."""
    unroll: bool = False
    """Store a shared block once for every time it runs, for readers without sharing: it grows as often."""

    ollama: bool = False
    """gguf: write a Modelfile for Ollama and the chat template beside the file."""

    def chosen(self) -> dict[str, object]:
        """Those that are not left at their default, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in fields(self)
            if getattr(self, field.name) != field.default
        }


@dataclass(frozen=True)
class Kind:
    """What is known of a target without importing it."""

    name: str
    module: str
    takes: frozenset[str]
    """Names of the fields of Options that mean something to it."""
    packages: tuple[str, ...]
    extra: str
    """Of this package: brings `packages`."""
    suffix: str = ""
    """Of its files; a directory has none."""
    marker: str = ""
    """The file by which a directory of this kind is told from others."""
    contents: tuple[str, ...] = ()
    """Patterns of what else such a directory holds, where it is no plain model directory."""

    def objection(self, directory: Path) -> str:
        """What shows that a directory about to be replaced is none of this kind, in words, or ""."""
        if not self.contents:
            return not_a_model_directory(directory)
        return made_of(self.marker, *self.contents)(directory)


DESCRIPTIONS = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip


KINDS = {
    kind.name: kind
    for kind in (
        Kind("hf", "mobilellm.export.to_hf", frozenset({"type", "unroll"}), ("torch", "transformers"), "hf",
             marker="model.safetensors"),
        Kind("gguf", "mobilellm.export.to_gguf", frozenset({"type", "embedding_type", "unroll", "ollama"}),
             ("torch", "gguf"), "export", suffix=".gguf"),
        Kind("onnx", "mobilellm.export.to_onnx", frozenset({"type", "embedding_type"}),
             ("torch", "onnx", "onnxruntime"), "onnx", marker="genai_config.json", contents=(
                 "onnx/model*.onnx", "onnx/model*.onnx_data", *DESCRIPTIONS)),
        Kind("executorch", "mobilellm.export.to_executorch", frozenset({"type", "embedding_type", "context"}),
             ("torch", "executorch"), "executorch", marker="model.pte", contents=DESCRIPTIONS),
    )
}  # fmt: skip


class Stored(NamedTuple):
    """A tensor in an artefact: its shape as in PyTorch, and its type by the target's own name for it."""

    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class Inventory:
    """What an artefact holds, or has to hold."""

    config: ModelConfig
    tensors: Mapping[str, Stored]
    """By the target's own names."""
    stop_ids: frozenset[int]
    """Token ids at which a runtime ends a text, as the artefact itself tells."""
    bytes: int
    """Of the whole artefact; of one that has to be, the prediction from config, scheme and tokenizer."""


class Target(Protocol):
    """What a module gives. `path` is a file or a directory under whatever name; `options` are complete."""

    kind: Kind

    def complete(self, options: Options, source: Source) -> Options:
        """Defaults filled in; a quantised source has its own. Raises ValueError for an unknown value."""

    def write(self, source: Source, path: Path, options: Options) -> list[str]:
        """Write the artefact at `path`, which is not there (a file) or an empty directory.

        Returns notes for the user, one line each (growth by --unroll, tensors in a wider type).
        """

    def options_of(self, path: Path, source: Source) -> Options:
        """With what options an artefact was written, from what it says of itself."""

    def expected(self, source: Source, options: Options) -> Inventory: ...

    def inventory(self, path: Path) -> Inventory:
        """What is there, read as strictly as can be. Raises ValueError or OSError for a damaged artefact."""

    def reference(self, source: Source, options: Options) -> Callable[[Sequence[int]], Floats]:
        """Token ids to logits (T, V) by the arithmetic the scheme stands for, made from the source alone."""

    def checks(self, path: Path, source: Source, options: Options) -> list[Check]:
        """Comparisons that only make sense for this target: values tensor by tensor, delegated layers."""

    def beside(self, name: str, source: Source, options: Options) -> Mapping[str, str]:
        """Text files that go beside an artefact of this final name, by their names. Mostly none.

        Raises ValueError for a wish that cannot be fulfilled; asked before anything is written.
        """

    def runtimes(self, path: Path) -> Mapping[str, Opener]:
        """What can run this very artefact here, the first by default. May be more than are installed."""


Opener = Callable[[Path], "AbstractContextManager[Runtime]"]
"""Opens an artefact in a runtime. Raises ImportError that names the mend where the runtime is missing."""


def target_of(name: str) -> Target:
    """The target of a name. Raises ValueError for one unknown, ImportError naming what to install."""
    if name not in KINDS:
        raise ValueError(f"to = {name!r} is not a target; choose one of {', '.join(KINDS)}")
    kind = KINDS[name]
    if missing := missing_packages(*kind.packages):
        raise ImportError(
            f"export to {name} needs {' and '.join(missing)}; install with: {install_command(kind.extra)}",
            name=missing[0],
        )
    return cast(Target, import_module(kind.module).TARGET)


def kind_for(out: Path) -> Kind:
    """The kind an artefact to be written under this name has. Raises ValueError where it cannot tell."""
    for kind in KINDS.values():
        if kind.suffix and out.suffix == kind.suffix:
            return kind
    raise ValueError(f"{out}: does not tell what to write; name a target: --to {' or --to '.join(KINDS)}")


def kind_of(path: Path) -> Kind:
    """The kind of an artefact that is there. Raises FileNotFoundError, or ValueError for none we know."""
    if not path.exists():
        unverified = unverified_name(path)
        there = f"; {unverified} is there, which was not compared or failed" if unverified.exists() else ""
        raise FileNotFoundError(f"{path}: no such artefact{there}")
    for kind in KINDS.values():
        if path.is_dir() and kind.marker and (path / kind.marker).is_file():
            return kind
        if path.is_file() and kind.suffix and final_name(path).suffix == kind.suffix:
            return kind
    raise ValueError(f"{path}: is no artefact of a known kind ({', '.join(KINDS)})")


def check_options(kind: Kind, options: Options) -> None:
    """Raises ValueError for an option this kind does not take."""
    for name, value in options.chosen().items():
        if name not in kind.takes:
            raise ValueError(f"{name} = {value} does not go with --to {kind.name}; leave it out")


def unverified_name(path: Path) -> Path:
    return path.with_name(path.name + UNVERIFIED)


def final_name(path: Path) -> Path:
    return path.with_name(path.name.removesuffix(UNVERIFIED))
