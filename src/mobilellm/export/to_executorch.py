"""A model as a directory with an ExecuTorch program and its tokenizer.

    model.pte              weights, program, and what ExecuTorch's runners want to know (BOS, EOS, lengths)
    tokenizer.json, …      for the runner; with BOS in front, as `num_bos=1` has it
    chat_template.jinja    if the model has one

XNNPACK runs all products. A shared block's weights are stored once: XNNPACK's data go by their SHA-256. So
are an embedding, a constant outside XNNPACK, and the head that is tied to it (`pte_program.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from mobilellm.artefacts.opening import PROGRAM, open_artefact
from mobilellm.bytes_on_disk import bytes_on_disk
from mobilellm.config import ModelConfig
from mobilellm.export.arithmetic import Rounding, rounded_logits
from mobilellm.export.check import Check, count_check
from mobilellm.export.engine_runtime import EngineRuntime
from mobilellm.export.pte_program import OUTSIDE, Contents, keys_of, lower, read_program
from mobilellm.export.questions import Floats
from mobilellm.export.source import Source, kept_types
from mobilellm.export.static_model import Embedding, Matrices, StaticModel, StoredMatrix
from mobilellm.export.targets import KINDS as TARGETS
from mobilellm.export.targets import Inventory, Opener, Options, Stored
from mobilellm.export.text import WINDOW
from mobilellm.model.quantized import Matrix
from mobilellm.model.rounding import TOKEN_ASYMMETRIC
from mobilellm.quant.formats import INT4, INT8
from mobilellm.quant.schemes import EMBEDDING_NAMES
from mobilellm.tokenizer import EOS_ID, Tokenizer

CHUNK = 64
"""Most tokens at once: the memory for their logits is planned, 8 MB at a vocabulary of 32,000."""
_STEP_BYTES, _BASE_BYTES = (7_500, 9_300), 14_500  # of the program, without weights: fp32, quantised
FORMATS = {"int4": INT4, "int8": INT8, "fp32": None}
EMBEDDING = "model.embed_tokens.weight"


_REFUSAL = ", which is not lowered to XNNPACK; quantise its source with --scheme 8da4w, in groups of 32"


class ExecutorchTarget:
    """See `Target`."""

    kind = TARGETS["executorch"]

    def complete(self, options: Options, source: Source) -> Options:
        """A model quantised in int4 and int8 keeps its own."""
        if source.quantized is not None:
            return kept_types(source, options, self.kind.name, {name: name for name in FORMATS}, _REFUSAL)
        kind = _known(options.type or "int4")
        embedding = _known(options.embedding_type or ("fp32" if kind == "fp32" else "int8"))
        return dataclasses.replace(options, type=kind, embedding_type=embedding)

    def write(self, source: Source, path: Path, options: Options) -> list[str]:
        config, context = source.config, _context(source.config, options)
        matrices = _matrices(source, options)
        names = _matrix_names(config)
        stored_as = {name: _type(matrices(name)) for name in names}
        description = {
            "config": config.to_dict(), "context": context, "chunk": min(CHUNK, context),
            "type": options.type, "embedding_type": options.embedding_type, "matrices": stored_as,
        }  # fmt: skip
        norms = partial(_norm, source)
        model = StaticModel(config, norms, matrices, context, min(CHUNK, context)).eval()
        (path / PROGRAM).write_bytes(lower(model, description))
        _check_whole(read_program(path / PROGRAM), source, options)
        _write_tokenizer(source.tokenizer, path, context)
        if source.chat_template is not None:
            (path / "chat_template.jinja").write_text(source.chat_template, encoding="utf-8")
        return _notes(source, options, stored_as, context)

    def options_of(self, path: Path, source: Source) -> Options:
        said = read_program(path / PROGRAM).description
        context = said["context"] if said["context"] != source.config.max_position_embeddings else None
        return Options(type=said["type"], embedding_type=said["embedding_type"], context=context)

    def expected(self, source: Source, options: Options) -> Inventory:
        config, context = source.config, _context(source.config, options)
        matrices = _matrices(source, options)
        shapes = {name: tuple(source.tensors[name].shape) for name in _matrix_names(config)}
        tensors = {name: Stored(shape, _type(matrices(name))) for name, shape in shapes.items()}
        head = EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
        multiplied = {name for name in shapes if ".layers." in name} | {head}
        weights = sum(_nbytes(matrices(name)) for name in multiplied)
        weights += _embedding_bytes(matrices(EMBEDDING), config.tie_word_embeddings)
        norms = 4 * (2 * config.num_layers + 1) * config.hidden_size
        rotary = 4 * (2 * context * config.head_dim + config.head_dim**2)
        program = _BASE_BYTES + _STEP_BYTES[options.type != "fp32"] * config.num_steps
        template = len((source.chat_template or "").encode())
        return Inventory(
            dataclasses.replace(config, max_position_embeddings=context),
            tensors,
            frozenset({EOS_ID}),
            weights + norms + rotary + program + source.tokenizer_bytes + template,
        )

    def inventory(self, path: Path) -> Inventory:
        """What the program says of itself; what it holds is looked at by a check of its own."""
        contents = read_program(path / PROGRAM)
        config = ModelConfig.from_dict(contents.description["config"], str(path))
        shapes = _shapes(config)
        return Inventory(
            dataclasses.replace(config, max_position_embeddings=contents.description["context"]),
            {name: Stored(shapes[name], kind) for name, kind in contents.description["matrices"].items()},
            contents.stop_ids,
            bytes_on_disk(path),
        )

    def reference(self, source: Source, options: Options) -> Callable[[Sequence[int]], Floats]:
        """Weights as stored; the input of a quantised matrix to 8 bits a token."""
        matrices, names = _matrices(source, options), set(_matrix_names(source.config))

        def rounded(name: str, values: torch.Tensor) -> torch.Tensor:
            matrix = matrices(name) if name in names else values
            return matrix.values() if isinstance(matrix, Matrix) else values

        model = source.model(rounded)

        def inputs(name: str) -> Rounding | None:
            return TOKEN_ASYMMETRIC if isinstance(matrices(name), Matrix) else None

        return lambda tokens: rounded_logits(model, tokens, inputs)

    def checks(self, path: Path, source: Source, options: Options) -> list[Check]:
        contents = read_program(path / PROGRAM)
        return _content_checks(contents, source, options)

    def beside(self, name: str, source: Source, options: Options) -> Mapping[str, str]:
        return {}

    def runtimes(self, path: Path) -> Mapping[str, Opener]:
        return {"executorch": executorch_runtime}


TARGET = ExecutorchTarget()


@contextmanager
def executorch_runtime(path: Path) -> Iterator[EngineRuntime]:
    """Raises ValueError for a program that cannot be run."""
    from executorch.version import __version__

    runtime = EngineRuntime(open_artefact(path))
    runtime.name = f"executorch {__version__}"
    yield runtime


def _write_tokenizer(tokenizer: Tokenizer, path: Path, context: int) -> None:
    """The usual files, without the last step of decoding, which takes the space in front of a text away.

    ExecuTorch's runner decodes token by token, and would take it away from every word.
    """
    tokenizer.save(path, model_max_length=context)
    file = path / "tokenizer.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    steps = [step for step in values["decoder"]["decoders"] if step["type"] != "Strip"]
    values["decoder"]["decoders"] = steps
    file.write_text(json.dumps(values, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _content_checks(contents: Contents, source: Source, options: Options) -> list[Check]:
    """Every matrix must be there as it is to be stored, and multiplied with by XNNPACK and nothing else."""
    config, matrices = source.config, _matrices(source, options)
    outside = sorted(contents.outside - OUTSIDE)
    names = [name for name in _matrix_names(config) if name != EMBEDDING or config.tie_word_embeddings]
    lost = [
        f"{name} is missing or differs"
        for name in names
        if not contents.data.issuperset(keys_of(matrices(name)))
    ]
    rows = Embedding(matrices(EMBEDDING)).codes
    assert isinstance(rows, torch.Tensor)
    if hashlib.sha256(rows.numpy().tobytes()).hexdigest() not in contents.constants:
        lost.append("the embedding's rows are missing or differ")
    quantised = sum(isinstance(matrices(name), Matrix) for name in names)
    few = [] if contents.delegates > config.num_steps else [f"only {contents.delegates} pieces are delegated"]
    return [
        count_check(
            "delegated", "operators", [f"{name} runs outside XNNPACK" for name in outside] + few,
            f"{contents.delegates} pieces for {config.num_steps} steps",
        ),
        count_check("weights", "matrices", lost, f"{quantised} of {len(names)} quantised, byte for byte"),
    ]  # fmt: skip


def _check_whole(contents: Contents, source: Source, options: Options) -> None:
    """Never silently unquantised, never silently left to slow operators. Raises ValueError."""
    for check in _content_checks(contents, source, options):
        if not check.passed:
            raise ValueError(
                f"{source.name}: was lowered wrong ({check.name}: {check.detail}); nothing is kept"
            )


def _known(kind: str) -> str:
    if kind not in FORMATS:
        raise ValueError(f"type = {kind!r} is not known to executorch; choose one of {', '.join(FORMATS)}")
    return kind


def _context(config: ModelConfig, options: Options) -> int:
    longest = config.max_position_embeddings
    context = options.context or longest
    if not min(WINDOW, longest) <= context <= longest:
        raise ValueError(
            f"context = {context}: must lie in {min(WINDOW, longest)} … {longest}, the model's own; "
            f"less than {WINDOW} tokens cannot be compared"
        )
    return context


def _matrix_names(config: ModelConfig) -> list[str]:
    return [name for name, shape in _shapes(config).items() if len(shape) == 2]


def _shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    from mobilellm.model.transformer import MobileLLM

    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in MobileLLM(config).named_parameters()}


def _matrices(source: Source, options: Options) -> Matrices:
    """Each matrix as it is to be stored, made once. Rows that int4's groups do not divide become int8."""
    made: dict[str, StoredMatrix] = {}

    def stored(name: str) -> StoredMatrix:
        if source.quantized is not None and name in source.quantized.matrices:
            return source.quantized.matrices[name]
        kind = FORMATS[str(options.embedding_type if name in EMBEDDING_NAMES else options.type)]
        weight = source.tensors[name].float()
        if kind is None:
            return weight.contiguous()
        return (kind if kind.fits(weight.shape[1]) else INT8).quantize(weight)

    def matrix(name: str) -> StoredMatrix:
        if name not in made:
            made[name] = stored(name)
        return made[name]

    return matrix


def _norm(source: Source, name: str) -> torch.Tensor:
    return source.tensors[name].float()


def _type(matrix: StoredMatrix) -> str:
    return f"int{matrix.bits}" if isinstance(matrix, Matrix) else "fp32"


def _nbytes(matrix: StoredMatrix) -> int:
    if not isinstance(matrix, Matrix):
        return matrix.nbytes
    wide = 2 if matrix.scales.shape[1] > 1 else 4
    return matrix.codes.numel() * matrix.bits // 8 + matrix.scales.numel() * wide


def _embedding_bytes(matrix: StoredMatrix, tied: bool) -> int:
    """Of an embedding's rows, without what a head tied to them brings. Scales are float32 outside XNNPACK."""
    if not isinstance(matrix, Matrix):
        return 0 if tied else matrix.nbytes
    scales = 4 * matrix.scales.numel()
    if tied:
        return scales if matrix.scales.shape[1] > 1 else 0
    return matrix.codes.numel() * matrix.bits // 8 + scales


def _notes(source: Source, options: Options, stored_as: Mapping[str, str], context: int) -> list[str]:
    config = source.config
    notes = [
        f"{name} is stored as {kind}: rows of {source.tensors[name].shape[1]} are no multiple of {INT4.group}"
        for name, kind in stored_as.items()
        if ".layers." in name and kind != options.type
    ]
    quantised = sum(kind != "fp32" for kind in stored_as.values())
    cache = 8 * config.num_steps * context * config.num_kv_heads * config.head_dim
    told = f"{quantised} of {len(stored_as)} matrices are quantised, " if quantised else ""
    notes.append(f"{told}all products run in XNNPACK")
    notes.append(
        f"keys and values take {cache / 1e6:,.0f} MB on the device, for {context} tokens"
        + ("; less with --context" if context > WINDOW else "")
    )
    return notes
