"""An artefact as an evaluation sees it, whatever runs it: by the logits of its own runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.config import ModelConfig
from mobilellm.eval.interface import Likelihood, ModelIdentity, Request
from mobilellm.eval.request_rows import check, rows_of
from mobilellm.export.questions import Runtime
from mobilellm.tokenizer import BOS_ID


class ArtefactModel:
    """A `LanguageModel` for tasks that ask for likelihoods, as the eight do; it generates no text.

    For runtimes that the evaluation has no faster way into: rows that share a beginning are fed again.
    """

    def __init__(self, runtime: Runtime, path: Path, config: ModelConfig, report: Mapping[str, Any]) -> None:
        """`report` is the artefact's verify report."""
        self._runtime, self._config = runtime, config
        self.identity = ModelIdentity(
            name=str(path),
            backend=runtime.name,
            dtype=str(report["options"].get("type")),
            device="cpu",
            fingerprint=report["sha256"],
            parameters=report["parameters"],
            bytes=report["bytes"],
            config=asdict(config),
        )

    @property
    def context(self) -> int:
        return self._config.max_position_embeddings

    @property
    def bos(self) -> int:
        return BOS_ID

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        """Ids of each text, with BOS in front unless `special` is false."""
        return [ids if special else ids[1:] for ids in self._runtime.encode(texts)]

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        """Refused: runtimes do not tell where in a text a token begins."""
        raise ValueError(f"{self.identity.name}: its runtime does not tell where in a text a token begins")

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        """(number of the request, its answer), long ones first. Raises ValueError as `check` does."""
        check(requests, self.context, self._config.vocab_size)
        return self._log_likelihoods(requests)

    def _log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        for row in rows_of(requests):
            logits = self._runtime.logits(row.tokens).astype(np.float64)
            for start, continuation, numbers in row.questions:
                rows, wanted = logits[start : start + len(continuation)], np.array(continuation)
                highest = rows.max(axis=1)
                total = np.log(np.exp(rows - highest[:, None]).sum(axis=1)) + highest
                tokens = (rows[np.arange(len(wanted)), wanted] - total).astype(np.float32)
                answer = Likelihood(tokens, bool((rows.argmax(axis=1) == wanted).all()))
                yield from ((number, answer) for number in numbers)

    def greedy(self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int) -> list[str]:
        """Refused: ids are what a runtime generates, and it does not tell their text."""
        raise ValueError(f"{self.identity.name}: its runtime does not tell the text of what it generates")
