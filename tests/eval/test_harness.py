"""Our adapter and lm-eval's Hugging Face backend give the same answers, at the edges too."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from language_models import PlainModel, ToldModel
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tiny_baselines import CONTEXT, TEXT, make

from mobilellm.eval.harness import HarnessModel, Progress, encode_pairs
from mobilellm.eval.interface import Request

ARCHITECTURES = ("llama", "opt", "gpt-neox")
"""Llama puts <s> in front by itself and OPT </s>; GPT-NeoX puts nothing, and has no BOS."""


@cache
def both(architecture: str, directory: Path) -> tuple[PlainModel, HFLM]:
    make(architecture, directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return PlainModel(model, tokenizer, CONTEXT), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)


@pytest.fixture(scope="module", params=ARCHITECTURES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PlainModel, HFLM]:
    return both(request.param, tmp_path_factory.mktemp(request.param))


def instances(kind: str, arguments: Sequence[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def test_log_likelihoods_equal_lm_evals(pair: tuple[PlainModel, HFLM]) -> None:
    model, reference = pair
    begin = reference.tokenizer.decode(reference.prefix_token_id)
    asked = [
        ("Question: what is an object?\nAnswer:", " a piece of data"),
        ("Question: what is an object?\nAnswer:", " a function"),
        ("The statement ends here.  ", "Then another"),  # spaces move to the continuation
        ("The statement ends with a line\n", "break"),
        ("", " no context at all"),
        ("", f"{begin}begins with the prefix itself"),
        (f"{begin}A context that begins with it", " continued"),
        (TEXT[:900], " and the end of it"),  # longer than the model's context
        (TEXT[1000:1500], TEXT[1500:1640]),
        ("naïve – 你", "好 🙂"),
        ("Question: what is an object?\nAnswer:", " a function"),  # again
    ]
    requests = instances("loglikelihood", asked)
    expected = reference.loglikelihood(requests, disable_tqdm=True)
    harness = HarnessModel(model)
    answers = harness.loglikelihood(requests)
    assert [total for total, _ in answers] == pytest.approx([total for total, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
    assert harness.truncated >= 1
    assert harness.requests == len(asked) - 1


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(ARCHITECTURES),
    st.text(st.sampled_from("ab e\n.é"), min_size=1, max_size=12),
    st.text(st.sampled_from("ab e\n.é"), min_size=1, max_size=8),
)
def test_pairs_are_cut_as_lm_eval_cuts_them(
    tmp_path_factory: pytest.TempPathFactory, architecture: str, context: str, continuation: str
) -> None:
    assume(context.strip())
    model, reference = both(architecture, tmp_path_factory.getbasetemp() / f"cut-{architecture}")
    before, after = reference._encode_pair(context, continuation)
    if after:
        assert encode_pairs(model, [(context, continuation)]) == [Request(tuple(before), tuple(after))]
    else:
        with pytest.raises(ValueError, match="adds no token to its context"):
            encode_pairs(model, [(context, continuation)])


def test_a_context_of_spaces_stands_on_the_prefix(pair: tuple[PlainModel, HFLM]) -> None:
    model, reference = pair
    ((before, after),) = encode_pairs(model, [("  ", "word")])
    assert before == (model.bos,)
    assert list(after) == reference.tok_encode("  word", add_special_tokens=False)


def test_cut_on_the_left_to_the_context() -> None:
    model = ToldModel(lambda context, continuation: -1.0, context=8)
    harness = HarnessModel(model)
    harness.loglikelihood(
        instances("loglikelihood", [("abcdef", "xyz"), ("abcdefg", "xyz"), ("abc", "12345678")])
    )
    asked = {"".join(map(chr, a)): "".join(map(chr, b)) for a, b in model.calls[0]}
    assert asked == {"abcdef": "xyz", "bcdefg": "xyz", "c": "12345678"}  # 8 tokens and the one predicted last
    assert harness.truncated == 2
    with pytest.raises(ValueError, match="an answer of 9 tokens is longer than the model's context of 8"):
        harness.loglikelihood(instances("loglikelihood", [("a", "123456789")]))


def test_a_bos_that_is_spelled_out_gets_no_second_one() -> None:
    model = ToldModel(lambda context, continuation: 0.0, adds_bos=True)
    assert encode_pairs(model, [("\0ab", "c"), ("ab", "c")]) == [Request((0, 97, 98), (99,))] * 2
    assert encode_pairs(model, [("", "c"), ("", "\0c")]) == [Request((0,), (99,))] * 2
    with pytest.raises(ValueError, match=r"the answer '\\x00' adds no token"):
        encode_pairs(model, [("", "\0")])


def test_rolling_equals_lm_evals(pair: tuple[PlainModel, HFLM]) -> None:
    model, reference = pair
    texts = [(TEXT[:40],), (TEXT[:1500],), ("",), (TEXT[2000:2900],)]
    requests = instances("loglikelihood_rolling", texts)
    expected = reference.loglikelihood_rolling(requests, disable_tqdm=True)
    assert HarnessModel(model).loglikelihood_rolling(requests) == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert expected[1] < expected[0] < 0


def test_rolling_windows_share_no_predicted_token() -> None:
    model = ToldModel(lambda context, continuation: -float(len(continuation)), context=4)
    totals = HarnessModel(model).loglikelihood_rolling(
        instances("loglikelihood_rolling", [("0123456789",), ("ab",)])
    )
    windows = [("".join(map(chr, a)), "".join(map(chr, b))) for a, b in model.calls[0]]
    assert windows == [("\0", "0123"), ("3", "4567"), ("567", "89"), ("\0", "ab")]
    assert totals == [-10.0, -2.0]


def test_greedy_texts_equal_lm_evals(pair: tuple[PlainModel, HFLM]) -> None:
    model, reference = pair
    some: dict[str, Any] = {"until": ["e", "\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [
        ("The statement", some),
        (TEXT[:700], some),  # cut on the left to leave room
        ("An object is", {"until": [" "], "max_gen_toks": 6, "temperature": 0.0}),
    ]
    requests = instances("generate_until", asked)
    expected = reference.generate_until(requests, disable_tqdm=True)
    harness = HarnessModel(model)
    assert harness.generate_until(requests) == expected
    assert harness.requests == 3


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"do_sample": True, "temperature": 0.7}, "asks for do_sample = True; only greedy"),
        ({"temperature": 0.7}, "asks for do_sample = True; only greedy"),
        ({"num_beams": 4, "until": ["x"]}, "asks for num_beams = 4; only greedy"),
        ({"max_gen_toks": 50}, "asks for 50 new tokens, and the model's context holds 50"),
    ],
)
def test_other_decoding_is_refused(asked: dict[str, Any], complaint: str) -> None:
    harness = HarnessModel(ToldModel(lambda context, continuation: 0.0, context=50))
    with pytest.raises(ValueError, match=complaint):
        harness.generate_until(instances("generate_until", [("text", asked)]))


def test_prompts_leave_room_and_stop_texts_arrive() -> None:
    harness = HarnessModel(ToldModel(lambda context, continuation: 0.0, context=8))
    asked = [
        ("abcdefgh", {"until": ["\n", ""], "max_gen_toks": 3}),
        ("xy", {"until": "z", "max_gen_toks": 4}),
    ]
    assert harness.generate_until(instances("generate_until", asked)) == ["defgh|\n|3", "xy|z|4"]


def test_one_call_for_everything_and_equal_requests_once() -> None:
    told = {("q", " a"): -1.0, ("q", " b"): -2.0, ("Answer:", " a"): -3.0}
    model = ToldModel(lambda context, continuation: told[context, continuation])
    seen: list[Progress] = []
    harness = HarnessModel(model, besides=[("Answer:", " a"), ("q", " b")], progress=seen.append)
    answers = harness.loglikelihood(instances("loglikelihood", [("q", " a"), ("q", " b"), ("q", " a")]))
    assert answers == [(-1.0, False), (-2.0, False), (-1.0, False)]
    assert harness.answers_besides == {("Answer:", " a"): -3.0, ("q", " b"): -2.0}
    assert len(model.calls) == 1
    assert len(model.calls[0]) == harness.requests == 3
    assert [(each.requests, each.all_requests) for each in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1].tokens == seen[-1].all_tokens == 3 + 3 + 9
    assert harness.seconds >= seen[-1].seconds >= 0


def test_the_model_may_speak_while_lm_eval_may_not(capsys: pytest.CaptureFixture[str]) -> None:
    from mobilellm.eval.tasks import quiet

    def told(context: str, continuation: str) -> float:
        print("the model", file=sys.stderr)
        return -1.0

    harness = HarnessModel(ToldModel(told))
    with quiet():
        print("lm-eval", file=sys.stderr)
        harness.loglikelihood(instances("loglikelihood", [("q", " a")]))
        print("lm-eval", file=sys.stderr)
    assert capsys.readouterr().err == "the model\n"
