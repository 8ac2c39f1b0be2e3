"""What is said of mistyped arguments: one line with what is missing or wrong, and what was likely meant."""

from __future__ import annotations

import pytest

from mobilellm.cli.complaints import complaint, perhaps
from mobilellm.cli.main import VERBS, _main


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("tokenizer", "tokenizer: needs the word train first: mobilellm tokenizer train …"),
        ("tokenizer train", "tokenizer train: needs --out PATH and --vocab-size INT"),
        ("train tiny", "tiny: no such recipe file, did you mean tiny-cpu?"),
        ("finetune m --recipe sft-cu", "sft-cu: no such recipe file, did you mean sft-cpu?"),
        (
            "tokenizer train x --vocab 9 --out t",
            "needs --vocab-size INT; --vocab is not known, did you mean --vocab-size?",
        ),
        ("eval", "eval: needs one of ppl, zero-shot, tools, chat, table, compare"),
        ("eval ppl", "eval ppl: needs MODEL (mobilellm eval ppl --help tells the arguments)"),
        (
            "eval pppl m",
            "'pppl' is not one of ppl, zero-shot, tools, chat, table, compare, did you mean ppl?",
        ),
        ("eval zero-shot m --data x", "eval zero-shot: --data is not known, did you mean --data-dir?"),
        (
            "eval table --size 125",
            "--size '125' must be 1.5b, 125m, 1b, 350m, 600m or all, did you mean 125m?",
        ),
        (
            "bench decod x",
            "bench: 'decod' is not one of decode, prefill, load, threads, did you mean decode?",
        ),
        (
            "train tiny-cpu --model.hidden 64 --stepz 3",
            "--model.hidden is not known, did you mean --model.hidden-size? "
            "--stepz is not known, did you mean --steps?",
        ),
        ("train tiny-cpu --optim.lr fast", "train: --optim.lr 'fast' must be a number"),
        ("train tiny-cpu --steps 1.5", "train: --steps '1.5' must be a whole number"),
        # Of flags that may be left out, whose types tyro tells one by one.
        ("generate m p --max-tokens many", "--max-tokens 'many' must be a whole number (mobilellm generate"),
        ("eval chat m --data x --held-out some", "--held-out 'some' must be a number (mobilellm eval"),
        ("bench decode 125m:Q8_0 --depths 4 x", "--depths '4' 'x' must be whole numbers (mobilellm bench"),
        ("chat m hi there", "chat: 'hi' and 'there' are too many"),
        ("finetune", "finetune: name a model first"),
        ("finetun", "'finetun' is not a command, did you mean finetune? commands are quickstart, "),
        ("xyz", "'xyz' is not a command; commands are quickstart, "),
    ],
)
def test_one_line_that_names_the_mend(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(typed.split()) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert (shown.out, shown.err.count("\n")) == ("", 1)


@pytest.mark.parametrize("columns", ["40", "80", "200"])
def test_the_same_at_any_width(
    columns: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert _main(["prepare", "x", "--tokenizer", "t", "--sorce", "y", "--held-otu", "0.1"]) == 2
    assert capsys.readouterr().err == (
        "mobilellm: error: prepare: needs --out PATH; --sorce is not known "
        "(mobilellm prepare --help tells the arguments)\n"
    )


def test_help_of_a_verb_by_either_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert (_main(["help", "merge"]), _main(["merge", "--help"])) == (0, 0)
    first, second = capsys.readouterr().out.split("usage: ")[1:]
    assert first == second


def test_nothing_is_guessed_from_afar() -> None:
    assert perhaps("zzz", VERBS) == ""
    assert perhaps("gen", VERBS) == ", did you mean generate?"


def test_a_box_of_another_version_is_told_as_it_is() -> None:
    box = "╭─ Required options ─╮\n│ Missing from mobilellm x: --out PATH │\n╰────────────────────╯\n"
    assert complaint(box, "x") == (
        "x: Missing from mobilellm x: --out PATH (mobilellm x --help tells the arguments)"
    )
