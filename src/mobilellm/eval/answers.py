"""Answers that were computed once and are kept: an evaluation that was stopped goes on where it was.

One SQLite file a model, in a folder of the user's cache. What an answer depends on is in the name of the
file and again inside: the fingerprint of the model, the backend and its version, dtype and kind of device.
A killed process loses the answers of its last second at most; several processes may use one file at once.
Every answer carries a checksum: a damaged one is refused, not used.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from mobilellm import __version__
from mobilellm.completion import Completion
from mobilellm.eval.answers_file import AnswersFile
from mobilellm.eval.interface import ChatFormat, LanguageModel, Likelihood, ModelIdentity, Request
from mobilellm.user_cache import user_cache

_log = logging.getLogger("mobilellm")

FORMAT = "mobilellm-answers-1"
"""Changes with the tables, and with whatever makes earlier answers wrong."""

_PROMPTS_AT_ONCE = 32


def default_folder() -> Path:
    return user_cache() / "evaluations"


class Cached:
    """A `LanguageModel` that asks another one only for what it has not answered before.

    `cached` and `scored` count the answers that were found and those that were computed. Where nothing can be
    written (a full disk), `say` is told once and scoring goes on. Raises ValueError with one line for a file
    that is damaged or not ours.
    """

    def __init__(
        self, model: LanguageModel, folder: Path | None = None, say: Callable[[str], None] = _log.warning
    ) -> None:
        self._model, self._say = model, say
        self.cached, self.scored = 0, 0
        key = _key(model.identity)
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        self.file = (folder or default_folder()) / f"{digest[:32]}.sqlite3"
        self._answers: AnswersFile | None = None
        try:
            self._answers = AnswersFile(self.file, key)
        except (OSError, sqlite3.OperationalError) as error:
            self._go_on_without(error)

    @property
    def identity(self) -> ModelIdentity:
        return self._model.identity

    @property
    def context(self) -> int:
        return self._model.context

    @property
    def bos(self) -> int:
        return self._model.bos

    def encode(self, texts: Sequence[str], special: bool = True) -> list[list[int]]:
        return self._model.encode(texts, special)

    def encode_with_places(self, text: str) -> tuple[list[int], list[int]]:
        return self._model.encode_with_places(text)

    @property
    def chat_template(self) -> str | None:
        return self._model.chat_template

    def chat_format(self, template: str) -> ChatFormat:
        return self._model.chat_format(template)

    def log_likelihoods(self, requests: Sequence[Request]) -> Iterator[tuple[int, Likelihood]]:
        """Those that are kept first, then the rest as the model gives them."""
        keys = [_request_key(request) for request in requests]
        missing = []
        known = self._find("likelihoods", keys)
        for number, (key, request) in enumerate(zip(keys, requests, strict=True)):
            if key not in known:
                missing.append(number)
                continue
            self.cached += 1
            yield number, _likelihood(known[key], request, self.file)
        del known
        if not missing:
            return
        answers = self._model.log_likelihoods([requests[number] for number in missing])
        try:
            for place, answer in answers:
                number = missing[place]
                self.scored += 1
                self._keep("likelihoods", keys[number], _likelihood_bytes(answer))
                yield number, answer
        finally:  # also where the caller stops listening
            self._flush()

    def greedy(
        self, prompts: Sequence[Sequence[int]], stop: Sequence[str], max_tokens: int
    ) -> list[Completion]:
        keys = [_prompt_key(prompt, stop, max_tokens) for prompt in prompts]
        known = self._find("texts", keys)
        self.cached += sum(key in known for key in keys)
        found = {key: Completion(*json.loads(value)) for key, value in known.items()}
        missing = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key not in found}
        self.scored += sum(key in missing for key in keys)
        ordered = sorted(missing, key=lambda key: len(missing[key]))  # the model may batch equal lengths
        for start in range(0, len(ordered), _PROMPTS_AT_ONCE):
            part = ordered[start : start + _PROMPTS_AT_ONCE]
            answers = self._model.greedy([missing[key] for key in part], stop, max_tokens)
            for key, answer in zip(part, answers, strict=True):
                found[key] = answer
                self._keep("texts", key, json.dumps(answer).encode())
            self._flush()
        return [found[key] for key in keys]

    def close(self) -> None:
        """Close the file. What is asked afterwards is computed and not kept."""
        self._flush()
        self._drop()

    def _find(self, table: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        if self._answers is None:
            return {}
        try:
            return self._answers.find(table, keys)
        except sqlite3.OperationalError as error:  # locked for long, or unreadable
            self._go_on_without(error)
            return {}

    def _keep(self, table: str, key: bytes, value: bytes) -> None:
        if self._answers is None:
            return
        try:
            self._answers.keep(table, key, value)
        except sqlite3.DatabaseError as error:
            self._go_on_without(error)

    def _flush(self) -> None:
        if self._answers is None:
            return
        try:
            self._answers.flush()
        except sqlite3.DatabaseError as error:
            self._go_on_without(error)

    def _drop(self) -> None:
        if self._answers is not None:
            self._answers.close()
            self._answers = None

    def _go_on_without(self, error: Exception) -> None:
        self._drop()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        self._say(f"{self.file}: answers are not kept from here on ({reason}); scoring goes on without")


def _key(identity: ModelIdentity) -> dict[str, str]:
    """All that an answer depends on beside what was asked."""
    try:
        version = importlib.metadata.version(identity.backend)
    except importlib.metadata.PackageNotFoundError:  # no package of its own: the runtime is part of this one
        version = __version__
    return {
        "format": FORMAT,
        "fingerprint": identity.fingerprint,
        "backend": identity.backend,
        "version": version,
        "dtype": identity.dtype,
        "device": identity.device.partition(":")[0],
    }


def _request_key(request: Request) -> bytes:
    context, continuation = (np.array(part, dtype="<i8").tobytes() for part in request)
    return _short_digest(len(context).to_bytes(8, "little"), context, continuation)


def _prompt_key(prompt: Sequence[int], stop: Sequence[str], max_tokens: int) -> bytes:
    return _short_digest(json.dumps(["completion", list(prompt), list(stop), max_tokens]).encode())


def _short_digest(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()[:20]


def _likelihood_bytes(answer: Likelihood) -> bytes:
    return bytes([answer.greedy]) + answer.tokens.astype("<f4").tobytes()


def _likelihood(value: bytes, request: Request, file: Path) -> Likelihood:
    tokens = np.frombuffer(value, dtype="<f4", offset=1).astype(np.float32)
    if len(tokens) != len(request.continuation):
        raise ValueError(f"{file}: kept answers are damaged (a length is wrong); delete the file")
    return Likelihood(tokens, bool(value[0]))
