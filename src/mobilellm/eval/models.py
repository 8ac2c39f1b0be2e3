"""Open a model for evaluation by what a person types: in our own code where it can run it, else transformers.

Both give a model of ours the same likelihoods of the same tokens. Our own code is the default, because it
needs no transformers and reads text as SentencePiece does.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from mobilellm import hub
from mobilellm.artefacts.opening import artefact_directory
from mobilellm.config import ConfigError
from mobilellm.eval.interface import LanguageModel
from mobilellm.installation import install_command, missing_packages
from mobilellm.model.api import load
from mobilellm.model.checkpoint import check_fit
from mobilellm.model_directory import is_adapter, read_config_file
from mobilellm.runtime.kv_cache import KVCacheType
from mobilellm.tokenizer import Tokenizer

_log = logging.getLogger("mobilellm")

BACKENDS = ("auto", "mobilellm", "transformers")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def open_model(
    source: str | Path,
    backend: str = "auto",
    dtype: str | None = None,
    device: str = "cpu",
    revision: str | None = None,
    trust_remote_code: bool = False,
    tokens_at_once: int | None = None,
    say: Callable[[str], None] = _log.warning,
    kv_cache: KVCacheType = "f16",
) -> LanguageModel:
    """A model directory, a training run, a Hub id, of any architecture that transformers knows; or a .gguf
    file; or a directory for ONNX Runtime or ExecuTorch.

    `backend` "auto" is "mobilellm" for whatever our own code runs, tokenizer included; else "transformers",
    and `say` is told why. `trust_remote_code` lets transformers execute code that comes with the model;
    `kv_cache` is for .gguf files. Raises ValueError, FileNotFoundError or ImportError with one line, which
    tells the mend.
    """
    if kv_cache != "f16" and not str(source).endswith(".gguf"):
        raise ValueError(f"kv_cache = {kv_cache} is for .gguf files; leave it out")
    if str(source).endswith(".gguf") or artefact_directory(source) is not None:
        return _in_the_runtime(source, backend, dtype, device, say, kv_cache)
    if backend not in BACKENDS:
        raise ValueError(f"backend = {backend!r} is not known; choose one of {', '.join(BACKENDS)}")
    say = _once(say)  # both the description and the weights of a Hub repository are announced
    directory = hub.resolve(source, say, revision, hub.DESCRIPTION)
    known = backend != "auto" or is_adapter(directory)
    reason = "" if known else _why_not_ours(directory, str(source))
    if backend == "mobilellm" or (backend == "auto" and not reason):
        return _ours(source, dtype, device, revision, tokens_at_once, say)
    if missing := missing_packages("transformers"):
        because = (
            f"{source}: only transformers can run it ({reason})" if reason else "backend = 'transformers'"
        )
        raise ImportError(
            f"{because}; that package is not installed; install it with: {install_command('hf')}",
            name=missing[0],
        )
    if reason:
        say(f"{source}: run by transformers, not by our own code, because {reason}")
    from mobilellm.eval.transformers_model import transformers_model

    place = directory if hub.local_path(source).is_dir() else source
    return transformers_model(
        place, dtype, device, revision, trust_remote_code, tokens_at_once, say, name=str(source)
    )


def _ours(
    source: str | Path,
    dtype: str | None,
    device: str,
    revision: str | None,
    tokens_at_once: int | None,
    say: Callable[[str], None],
) -> LanguageModel:
    from mobilellm.eval.torch_model import torch_model

    loaded = load(source, dtype, device, revision, say)
    if loaded.tokenizer is None:
        raise _no_tokenizer(str(source))
    model: LanguageModel = torch_model(loaded, tokens_at_once)
    return model


def _in_the_runtime(
    source: str | Path,
    backend: str,
    dtype: str | None,
    device: str,
    say: Callable[[str], None],
    kv_cache: KVCacheType,
) -> LanguageModel:
    """A file or directory for a device, run on the CPU as it is stored: nothing else can be asked for."""
    directory = artefact_directory(source)
    what = "a .gguf file" if directory is None else "which runs as it is stored"
    for name, value, only in (
        ("backend", backend, "auto"),
        ("dtype", dtype, None),
        ("device", device, "cpu"),
    ):
        if value != only:
            raise ValueError(f"{name} = {value} does not go with {source}, {what}; leave it out")
    if directory is not None:
        from mobilellm.eval.artefact_model import artefact_language_model

        return artefact_language_model(directory)
    from mobilellm.eval.runtime_model import gguf_language_model

    return gguf_language_model(source, say, kv_cache)


def _why_not_ours(directory: Path, source: str) -> str:
    """What keeps our own code from running a model, or "". Raises for what no other code can mend either."""
    try:
        described = read_config_file(directory)
    except ConfigError as error:
        if _stated_type(directory) in (None, "mobilellm"):
            raise
        return str(error).removeprefix(f"{directory / 'config.json'}: ")
    if not any((directory / name).is_file() for name in _TOKENIZER_FILES):
        raise _no_tokenizer(source)
    try:
        tokenizer = Tokenizer.load(directory)
    except (ValueError, FileNotFoundError) as error:
        return f"our own code cannot read its tokenizer: {error}"
    check_fit(tokenizer, described.config, source)
    return ""


def _stated_type(directory: Path) -> str | None:
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return None
    kind = values.get("model_type") if isinstance(values, dict) else None
    return kind if isinstance(kind, str) else None


def _no_tokenizer(source: str) -> FileNotFoundError:
    return FileNotFoundError(
        f"{source}: has no tokenizer.json or tokenizer.model, so it cannot read text; "
        "put one beside the weights"
    )


def _once(say: Callable[[str], None]) -> Callable[[str], None]:
    """Say no line twice."""
    said = set[str]()

    def say_once(line: str) -> None:
        if line not in said:
            said.add(line)
            say(line)

    return say_once
