"""The `paper` column: a reconstruction of the scoring behind the published tables.

The authors scored with an internal pipeline, "similar" to lm-eval and never published; it is that of LLaMA
(Touvron et al. 2023, section 3), whose paper says how it scores: the answer with the highest likelihood per
character, and for BoolQ and OpenBookQA, following GPT-3, the highest
P(answer | question) / P(answer | "Answer:"). The prompts are lm-eval's, because theirs are not known. So the
column is nearer to the tables than plain accuracy may be, and equal to them only by luck.
"""

from __future__ import annotations

from collections.abc import Sequence

from mobilellm.eval.tasks import Scoring

UNCONDITIONAL = "Answer:"
"""The context without a question."""


def chosen(
    scoring: Scoring,
    log_likelihoods: Sequence[float],
    continuations: Sequence[str],
    unconditional: Sequence[float],
    delimiter: str = " ",
) -> int:
    """The number of the answer the model prefers; the first of equals, as in lm-eval.

    Characters are counted as lm-eval's acc_norm counts them: code points, without the `delimiter` in front.
    Where there is one continuation after several contexts, as in WinoGrande, its length says nothing.
    """
    if scoring == "per character":
        lengths = [len(text.removeprefix(delimiter)) for text in continuations]
        scores = [value / length for value, length in zip(log_likelihoods, lengths, strict=True)]
    elif scoring == "against the unconditional answer":
        scores = [value - prior for value, prior in zip(log_likelihoods, unconditional, strict=True)]
    else:
        scores = list(log_likelihoods)
    return scores.index(max(scores))
