"""What an artefact answers in its own runtime, beside what its source says: checks, each with a bar."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mobilellm.export.check import Check, count_check
from mobilellm.export.fidelity import Fidelity
from mobilellm.export.questions import Answers, Floats, Questions
from mobilellm.export.targets import Inventory
from mobilellm.tokenizer import Tokenizer

LOGITS_BAR = 0.1
"""Root mean square of what logits are off, over that of the logits themselves, both centred.

Another order of sums, keys and values in float16 and inputs in 8 bits make 0.03 in 30 random layers; a wrong
layout makes 0.5."""
CACHE_BAR = 0.05
COST_FACTOR, COST_FLOOR = 1.25, 1e-3


def answer_checks(
    answers: Answers,
    questions: Questions,
    tokenizer: Tokenizer,
    reference: Callable[[Sequence[int]], Floats],
    reference_logits: Sequence[Floats],
    measured: Fidelity,
) -> list[Check]:
    """What the artefact does in its runtime, beside the source's tokenizer and the reference arithmetic."""
    wanted = np.concatenate(reference_logits)
    off = _off(np.concatenate(answers.logits), wanted)
    at_once = answers.logits[0][: len(questions.steps)]
    stepwise = _relative(_off(answers.steps, at_once), at_once)
    allowed = COST_FACTOR * measured.cost + COST_FLOOR
    return [
        _tokenizer_check(answers, questions, tokenizer),
        Check(
            "logits", _relative(off, wanted), LOGITS_BAR, "of the reference's", f"{len(wanted)} tokens"
        ),
        Check(
            "scheme's cost", measured.kl, allowed, "nats a token",
            f"KL from the source; the scheme itself costs {measured.cost:.2g}",
        ),
        Check("cache", stepwise, CACHE_BAR, "of all at once", f"{len(questions.steps)} tokens, one by one"),
        _greedy_check(answers, questions, tokenizer.vocab_size, reference, off),
    ]  # fmt: skip


def stop_check(found: Inventory, expected: Inventory, answers: Answers, questions: Questions) -> Check:
    """The artefact names the stop tokens, and generation ends when the model wants one."""
    after, token = questions.stop
    faults = [
        f"the artefact does not name {stop} as stop token" for stop in expected.stop_ids - found.stop_ids
    ]
    faults += [f"the artefact stops at {stop}" for stop in found.stop_ids - expected.stop_ids]
    new = answers.stopped
    kept_to_itself = len(new) == after  # as some runtimes do with a stop token
    if not kept_to_itself and token not in new[-1:]:
        faults.append(f"generation goes on after token {token}")
    return count_check("stop token", "faults", faults, f"generation ends with token {token}")


def chat_checks(
    answers: Answers,
    questions: Questions,
    vocabulary: int,
    reference: Callable[[Sequence[int]], Floats],
    reference_logits: Sequence[Floats],
) -> list[Check]:
    """Of a model to talk to: a conversation has the ids that the source's template gives it, and the answer
    ends where the source would end it, because the model wants to."""
    asked = questions.chat
    if asked is None:
        return []
    faults = _prompt_faults(answers.chat, asked.ids)
    checks = [
        count_check("chat prompt", "faults", faults, f"{len(asked.messages)} messages, {len(asked.ids)} ids")
    ]
    off = _off(np.concatenate(answers.logits), np.concatenate(reference_logits))
    name = "stops as its source does"
    if answers.chat is None or off is None:
        return [*checks, Check(name, None, 0, "tokens", "there is nothing to compare")]
    said = answers.said
    stopped = questions.stop[1] in said[-1:]
    if not stopped and len(said) < asked.most:
        said, stopped = [*said, questions.stop[1]], True  # it ended, and keeps the stop token to itself
    far, first = _far(answers.chat, said, vocabulary, reference, off)
    faults = [
        f"it stops after {index} tokens"
        if said[index] == questions.stop[1]
        else f"token {index} ({said[index]})"
        for index in far
    ]
    after = f"after {len(said) - 1} tokens" if stopped else f"not within {len(said)} tokens"
    compared = f"{after}; {first} of {len(said)} are the reference's first choice, the rest near it"
    return [*checks, count_check(name, "tokens", faults, compared)]


def _prompt_faults(found: Sequence[int] | None, wanted: Sequence[int]) -> list[str]:
    if found is None:
        return ["the artefact has no chat template, and its source has"]
    if list(found) == list(wanted):
        return []
    if list(found[1:]) == list(wanted):
        return [f"token {found[0]} stands twice in front"]
    pairs = enumerate(zip(found, wanted, strict=False))
    place = next((index for index, (a, b) in pairs if a != b), min(len(found), len(wanted)))
    return [f"{len(found)} ids, of the source {len(wanted)}; they differ from the {place + 1}th on"]


def _tokenizer_check(answers: Answers, questions: Questions, tokenizer: Tokenizer) -> Check:
    wanted = tokenizer.encode_batch(questions.texts)
    faults = [
        f"{questions.texts[index][:40]!r} gives other ids"
        for index, ids in enumerate(wanted)
        if index >= len(answers.ids) or answers.ids[index] != ids
    ]
    total = sum(map(len, wanted))
    return count_check("tokenizer", "texts", faults, f"{len(wanted)} texts, {total:,} ids")


def _greedy_check(
    answers: Answers,
    questions: Questions,
    vocabulary: int,
    reference: Callable[[Sequence[int]], Floats],
    off: Floats | None,
) -> Check:
    new = answers.greedy
    if not new or off is None:
        return Check("greedy text", None, 0, "tokens", "there is nothing to compare")
    far, first = _far(questions.prompt, new, vocabulary, reference, off)
    faults = [f"token {index} ({new[index]})" for index in far]
    compared = f"{first} of {len(new)} are the reference's first choice, the rest near it"
    return count_check("greedy text", "tokens", faults, compared)


def _far(
    prompt: Sequence[int],
    new: Sequence[int],
    vocabulary: int,
    reference: Callable[[Sequence[int]], Floats],
    off: Floats,
) -> tuple[list[int], int]:
    """Which of the new tokens are far from the reference's first choice, and how many are that choice.

    Each must be the first choice, or so near it that what logits are off explains it.
    """
    logits = reference([*prompt, *new[:-1]])[len(prompt) - 1 :]
    named = logits[:, :vocabulary]  # the embedding may have more rows, which a runtime may leave out or not
    behind = named.max(axis=1) - logits[np.arange(len(new)), new]
    allowed = min(2 * float(np.abs(off).max()), float(logits.std(axis=1).mean())) + 1e-4
    return np.flatnonzero(behind > allowed).tolist(), int((behind <= 0).sum())


def _off(found: Floats, wanted: Floats) -> Floats | None:
    """What centred logits are off; None for some that cannot be compared."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return None
    off: Floats = _centred(found) - _centred(wanted)
    return off


def _relative(off: Floats | None, wanted: Floats) -> float | None:
    """Root mean square of what logits are off, over that of the wanted ones."""
    if off is None:
        return None
    return float(np.sqrt(np.square(off, dtype=np.float64).mean() / np.square(_centred(wanted)).mean()))


def _centred(logits: Floats) -> Floats:
    out: Floats = logits - logits.mean(axis=1, keepdims=True)
    return out
