"""What `quantize` does for one scheme and for a sweep of them: the model, the texts, progress."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from mobilellm.cli.notices import say
from mobilellm.cli.quantize_texts import calibration_texts, evaluation_texts

if TYPE_CHECKING:
    from mobilellm.model.api import LoadedModel
    from mobilellm.quant.compare import Judge
    from mobilellm.quant.quantize import Calibration, Progress
    from mobilellm.tokenizer import Tokenizer

_SECONDS_A_LINE = 10
_WINDOW = 2_048
"""Tokens at once, to compare and to calibrate on; fewer where the model's context is shorter."""


def load_source(source: str) -> tuple[LoadedModel, Path]:
    """In float32: that holds bfloat16 and float16 exactly, and what is compared is the rounding alone."""
    from mobilellm import hub
    from mobilellm.model.api import load

    directory = hub.resolve(source, say)
    loaded = load(directory, "float32", say=say)
    if (quantization := loaded.model.quantization) is not None:
        raise ValueError(
            f"{source}: is quantised already ({quantization.scheme}); quantise what it was made from"
        )
    return loaded, directory


def stored_fingerprint(directory: Path, tokenizer: Tokenizer | None) -> str | None:
    """Of the model as it lies there, as an export tells its source; None for what cannot be exported."""
    from mobilellm.model import checkpoint
    from mobilellm.model.tensor_files import fingerprint
    from mobilellm.model_directory import is_adapter

    if tokenizer is None or is_adapter(directory):
        return None
    return fingerprint(checkpoint.read_weights(directory, on_demand=True).tensors, tokenizer)


def make_judge(loaded: LoadedModel, files: tuple[Path, ...], tokens: int) -> tuple[Judge | None, list[str]]:
    """What compares with the source, and the names of its texts; none for no tokens."""
    from mobilellm.eval.torch_model import torch_model
    from mobilellm.quant.compare import Judge, windows

    if tokens < 0:
        raise ValueError(f"eval_tokens = {tokens} must be at least 0")
    if tokens == 0:
        return None, []
    names, texts = evaluation_texts(files, say)
    model = torch_model(loaded)
    return Judge(loaded.model, windows(model, texts, min(model.context, _WINDOW), tokens)), names


def make_calibration(
    loaded: LoadedModel, files: tuple[Path, ...], tokens: int, act_order: bool
) -> tuple[Calibration, list[str]]:
    """What GPTQ is given, and the names of its texts."""
    import torch

    from mobilellm.eval.torch_model import torch_model
    from mobilellm.quant.compare import windows
    from mobilellm.quant.quantize import Calibration

    if tokens < 1:
        raise ValueError(f"calibration_tokens = {tokens} must be at least 1")
    names, texts = calibration_texts(files, say)
    model = torch_model(loaded)
    units = windows(model, texts, min(model.context, _WINDOW), tokens)
    ids = ([*unit.requests[0].context, *unit.requests[0].continuation] for unit in units)
    return Calibration(tuple(torch.tensor(each) for each in ids), act_order), names


@contextmanager
def progress_bar(before: str = "") -> Iterator[Progress]:
    """`before` stands in front of what is done. Where no terminal shows a bar, lines on standard error do."""
    from mobilellm.report.live_bar import LiveBar

    with LiveBar(transient=True) as bar:
        lines = _ProgressLines()

        def progress(what: str, done: int, total: int) -> None:
            text = f"{before}{done:,} of {total:,} {what}"
            if bar.is_live:
                bar.show(done, text, total)
            else:
                lines.show(text, last=done == total)

        yield progress


class _ProgressLines:
    """A line every ten seconds, so that what takes minutes is not silent, and what takes a second is."""

    def __init__(self) -> None:
        self._next = time.monotonic() + _SECONDS_A_LINE
        self._said = False

    def show(self, text: str, last: bool) -> None:
        if time.monotonic() >= self._next or (last and self._said):
            say(text)
            self._said = not last
            self._next = time.monotonic() + _SECONDS_A_LINE
