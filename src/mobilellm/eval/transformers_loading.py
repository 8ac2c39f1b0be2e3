"""A model and its tokenizer from the Auto classes of transformers, whole or not at all.

transformers itself leaves a missing weight random, makes up an empty tokenizer, and explains its errors in
paragraphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from mobilellm.hf import register
from mobilellm.model.tensor_files import some


def load_whole(
    source: str | Path,
    dtype: torch.dtype | None,
    device: str,
    revision: str | None,
    trust_remote_code: bool,
    name: str,
    say: Callable[[str], None],
) -> tuple[Any, Any]:
    """The model, in evaluation mode, and the tokenizer.

    Without a dtype the stored one is kept, except float16 on a CPU, which becomes float32 (exact, and fast).
    Raises ValueError or FileNotFoundError with one line that begins with `name`.
    """
    register()  # our own layouts
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with _one_line_errors(name), _no_bars(Path(source).is_dir()):
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(source), **options)
        _check_tokenizer(tokenizer, name)
        model = _load(source, dtype or "auto", options, name, say)
        if dtype is None and model.dtype == torch.float16 and torch.device(device).type == "cpu":
            del model
            model = _load(source, torch.float32, options, name, lambda _: None)
    return model.to(device).eval(), tokenizer


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
