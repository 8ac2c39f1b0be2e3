"""What every evaluation does with a model: open it, keep its answers, show how far it is, stop well."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from mobilellm.cli.engine_flags import KVCache
from mobilellm.cli.notices import say
from mobilellm.report.live_bar import LiveBar

if TYPE_CHECKING:
    from mobilellm.eval.interface import LanguageModel

_SECONDS_BETWEEN_LINES = 30.0


@dataclass(frozen=True)
class ModelOptions:
    dtype: str | None = None
    """float32, bfloat16 or float16; by default as stored (float16 becomes float32 on a CPU)."""
    device: str = "cpu"
    """torch device, e.g. cpu or cuda."""
    backend: Literal["auto", "mobilellm", "transformers"] = "auto"
    """What runs the model: auto takes this package's own code wherever it knows the layout."""
    revision: str | None = None
    """Branch, tag or commit of a Hub repository."""
    trust_remote_code: tyro.conf.FlagCreatePairsOff[bool] = False
    """Run code that comes with the model (transformers)."""
    tokens_at_once: int | None = None
    """Tokens in one forward pass: fewer take less memory."""
    kv_cache: KVCache = "f16"
    cache: Path | None = None
    """Folder of answers by model and request: what is in it is not asked again. Default: the user's cache."""
    no_cache: tyro.conf.FlagCreatePairsOff[bool] = False
    """Neither read nor keep answers."""


@dataclass(frozen=True)
class Scored:
    model: LanguageModel
    progress: Callable[[int, int], None]
    counts: Callable[[], tuple[int, int]] | None
    """Requests scored, requests answered from the cache; None without a cache."""


@contextmanager
def scored_model(name: str, options: ModelOptions, unit: str) -> Iterator[Scored]:
    """Open a model for scoring. Ctrl-C inside ends with a line that says what is kept.

    `unit` names what the progress counts.
    """
    from mobilellm.eval.answers import Cached
    from mobilellm.eval.models import open_model

    model = open_model(
        name,
        backend=options.backend,
        dtype=options.dtype,
        device=options.device,
        revision=options.revision,
        trust_remote_code=options.trust_remote_code,
        tokens_at_once=options.tokens_at_once,
        say=say,
        kv_cache=options.kv_cache,
    )
    cached = None if options.no_cache else Cached(model, options.cache)
    try:
        with _Progress(unit) as progress:
            if cached is None:
                yield Scored(model, progress, None)
            else:
                yield Scored(cached, progress, lambda: (cached.scored, cached.cached))
    except KeyboardInterrupt:
        if cached is not None:
            say(f"stopped; {cached.scored:,} answers of this run are kept, and the same command goes on")
        raise


class _Progress(LiveBar):
    """A live bar on a terminal, a line now and then in a pipe; all on stderr."""

    def __init__(self, unit: str) -> None:
        super().__init__(transient=True)
        self._unit, self._began = unit, time.monotonic()
        self._next_line = self._began + _SECONDS_BETWEEN_LINES

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        text = f"{done:,} of {total:,} {self._unit}"
        if (seconds := now - self._began) > 1:
            text += f"  {done / seconds:,.0f} a second"
        self.show(done, text, total)
        if not self.is_live and now >= self._next_line:
            self._next_line = now + _SECONDS_BETWEEN_LINES
            print(f"{done / max(total, 1):6.1%}  {text}", file=sys.stderr, flush=True)
