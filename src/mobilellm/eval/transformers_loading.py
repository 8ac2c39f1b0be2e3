"""A model and its tokenizer from the Auto classes of transformers, whole or not at all.

transformers itself leaves a missing weight random, makes up an empty tokenizer, and explains its errors in
paragraphs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers

from mobilellm.hf import register
from mobilellm.model.products import has_bfloat16
from mobilellm.model.tensor_files import some


class LoadedWhole(NamedTuple):
    """A model in evaluation mode and its tokenizer; the rest is of the weights as they are stored."""

    model: Any
    tokenizer: Any
    fingerprint: str
    """SHA-256 over config.json, the weights and the tokenizer; the same whatever dtype is computed in."""
    parameters: int
    bytes: int


def load_whole(
    source: str | Path,
    dtype: torch.dtype | None,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    name: str,
    say: Callable[[str], None],
) -> LoadedWhole:
    """Load, and look at what was loaded.

    Without a dtype the stored one is kept, except where a CPU would be slow in it: there it becomes float32,
    which is exact. Raises ValueError or FileNotFoundError with one line that begins with `name`.
    """
    register()  # our own layouts
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with _one_line_errors(name), _no_bars(Path(source).is_dir()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), **options)
        _check_tokenizer(tokenizer, name)
        model = _load(source, "auto", options, name, say)
        config, _ = transformers.PreTrainedConfig.get_config_dict(str(source), revision=revision or "main")
        fingerprint = _fingerprint(config, model, tokenizer)
        weights = list(model.parameters())  # a shared one once
        parameters = sum(weight.numel() for weight in weights)
        size = sum(weight.numel() * weight.element_size() for weight in weights)
        wanted = dtype or _quick_dtype(model.dtype, device)
        if wanted != model.dtype:  # anew: converted afterwards, tables of positions would be rounded too
            del model, weights
            model = _load(source, wanted, options, name, lambda _: None)
    return LoadedWhole(model.to(device).eval(), tokenizer, fingerprint, parameters, size)


def _quick_dtype(stored: torch.dtype, device: str) -> torch.dtype:
    if torch.device(device).type != "cpu" or stored not in (torch.float16, torch.bfloat16):
        return stored
    return stored if stored == torch.bfloat16 and has_bfloat16() else torch.float32


def _fingerprint(config: dict[str, Any], model: Any, tokenizer: Any) -> str:
    said = {key: value for key, value in config.items() if not key.startswith("_")}  # _name_or_path, ...
    said.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for label, weight in sorted(model.named_parameters()):  # a shared one under its first name
        digest.update(f"\n{label} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(memoryview(weight.detach().contiguous().flatten().view(torch.uint8).numpy()))
    content = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id]
    digest.update(json.dumps([content, special], sort_keys=True).encode())
    return digest.hexdigest()


def _load(
    source: str | Path,
    dtype: torch.dtype | str,
    options: dict[str, Any],
    name: str,
    say: Callable[[str], None],
) -> Any:
    model, found = transformers.AutoModelForCausalLM.from_pretrained(
        str(source), dtype=dtype, output_loading_info=True, **options
    )
    if missing := sorted([*found["missing_keys"], *(str(key) for key in found["mismatched_keys"])]):
        raise ValueError(f"{name}: the weights lack {some(missing)}; fetch or save the model again")
    if unused := sorted(found["unexpected_keys"]):
        say(f"{name}: the model does not use these stored weights: {some(unused)}")
    return model


def _check_tokenizer(tokenizer: Any, name: str) -> None:
    """transformers makes an empty tokenizer where the files of one are missing."""
    if not tokenizer("Hello, world", add_special_tokens=False)["input_ids"]:
        raise FileNotFoundError(
            f"{name}: the files of its tokenizer are missing (tokenizer.json, or vocab.json and merges.txt); "
            "put them beside the weights"
        )


@contextmanager
def _one_line_errors(name: str) -> Iterator[None]:
    """transformers explains itself in paragraphs, and damaged files raise almost anything."""
    try:
        yield
    except ImportError:  # of a package that the model's own code needs
        raise
    except Exception as error:
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = said[0] if said else type(error).__name__
        if reason.startswith(f"{name}: "):  # it is ours
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(reason) from None
        if "trust_remote_code" in str(error):
            reason = "it brings its own code; with trust_remote_code that is executed (read it first)"
        raise ValueError(f"{name}: transformers cannot load it: {reason}") from None


@contextmanager
def _no_bars(quiet: bool) -> Iterator[None]:
    """Without the bars of a loading that takes no time; those of a download stay."""
    bars = transformers.utils.logging
    if not quiet or not bars.is_progress_bar_enabled():
        yield
        return
    bars.disable_progress_bar()
    try:
        yield
    finally:
        bars.enable_progress_bar()
