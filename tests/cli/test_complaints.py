"""What is said of mistyped arguments: one line with what is missing or wrong, and what was likely meant."""

from __future__ import annotations

import re

import pytest

from mobilellm.cli.complaints import complaint, flags_with_kinds, perhaps
from mobilellm.cli.guesses import _MEANT
from mobilellm.cli.main import VERBS, _main

from .refusals import refusal


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
        ("chat m --json hi", "chat: 'hi' is too many; --json takes no value"),
        # A value with "=" where none is taken: else it would be the first argument of the verb.
        (
            "train tiny-cpu --compute.compile=maybe",
            "train: --compute.compile 'maybe': it takes no value; type --compute.compile or --compute.no-compile",
        ),
        ("export --no-verify=1 m o", "--no-verify '1': it takes no value; type --verify or --no-verify"),
        ("eval ppl m --no-cache=yes", "--no-cache 'yes': it takes no value; type --no-cache or leave it out"),
        ("eval --json=3", "eval: --json is not known"),
        ("quantize m --bitz=4", "quantize: --bitz is not known"),
        # Of a variable that is not set.
        ("prepare x --tokenizer=t --out=", "prepare: --out '' must be a path (mobilellm prepare --help"),
        ("finetune", "finetune: name a model first"),
        ("finetun", "'finetun' is not a command, did you mean finetune? commands are quickstart, "),
        ("xyz", "'xyz' is not a command; commands are quickstart, "),
        ("run m.gguf", "'run' is not a command; what does it is: mobilellm chat MODEL\n"),
        ("-v", "'-v' is not a command; what does it is: mobilellm --version\n"),
        # A model where the word for what is wanted of it should be.
        ("eval runs/x", "chat, table, compare; name one first: mobilellm eval ppl runs/x (mobilellm eval"),
        ("bench m.gguf", "load, threads; name one first: mobilellm bench decode m.gguf (mobilellm bench"),
        ("shards s", "export; name one first: mobilellm shards info s (mobilellm shards"),
        ("eval chat --data x", "eval chat: no model is named; name at least one"),
        # What is trained on, without its flag or by another.
        (
            "train tiny-cpu shards",
            "train: shards names nothing to train on; that is: mobilellm train tiny-cpu ",
        ),
        ("train tiny-cpu --steps 3 --data s", "train: --data names nothing to train on; that is: mobilellm"),
        (
            "train sft-cpu --train=t.json",
            "train: --train names nothing to train on; that is: mobilellm train sft-cpu --chat.train FILE",
        ),
        (
            "finetune m t.json",
            "finetune: t.json names nothing to train on; that is: mobilellm finetune m --chat.train FILE",
        ),
        ("train tiny-cpu --data.train nowhere", "(mobilellm prepare TEXT --tokenizer DIR --out FOLDER makes"),
        # A flag where there is none.
        ("chat --sytem x m", "chat: --sytem is not known, did you mean --system? (mobilellm chat --help"),
        ("chat --json --sytem=x m", "chat: --sytem is not known, did you mean --system?"),
        ("eval ppl --dat x m", "eval ppl: --dat is not known, did you mean --data?"),
        ("chat --model m", "chat: MODEL goes without a flag: mobilellm chat MODEL (mobilellm chat --help"),
    ],
)
def test_one_line_that_names_the_mend(typed: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refusal(capsys, *typed.split())


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


_NEEDED = {
    "train": "tiny-cpu", "tokenizer": "train --out o --vocab-size 9", "data": "show", "quickstart": "",
    "prepare": "x --tokenizer t --out o", "export": "m o.gguf", "generate": "m p", "verify": "a --against m",
    "merge": "a --out o", "convert": "m o", "quantize": "m o", "web": "m o",
    "eval chat": "m --data x", "eval table": "", "eval compare": "a b", "shards merge": "x --out o",
    "shards import": "x --out o --tokenizer t", "shards export": "x o --nodes 1",
}  # fmt: skip
"""What a verb has to be given, where that is not one word."""
_BELOW = {
    "eval": ("ppl", "zero-shot", "tools", "chat", "table", "compare"),
    "bench": ("decode", "prefill", "load"),
    "shards": ("info", "merge", "import", "export"),
    "report": ("artefacts",),
}


@pytest.mark.parametrize(
    "command",
    [
        *(verb for verb in VERBS if verb not in ("eval", "bench", "shards")),
        *(f"{verb} {word}" for verb, words in _BELOW.items() for word in words),
    ],
)
def test_a_bad_value_after_an_equals_sign(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One flag of every kind that the verb has: told by its name, with the value and what would do."""
    words = [*command.split(), *_NEEDED.get(command, "m").split()]
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("COLUMNS", "120")
        assert _main([*words, "--help"]) == 0
    kinds = flags_with_kinds(capsys.readouterr().out)
    assert kinds.pop("--help") == kinds.pop("-h") == ""
    one_of_each = {kind.removeprefix("{None}|"): flag for flag, kind in kinds.items()}
    asked = 0
    for kind, flag in one_of_each.items():
        choices = re.sub(r"[\[{]*([^{}]*).*", r"\1", kind).split(",")  # of {a,b}, or of [{a,b} [{a,b} ...]]
        if kind == "":
            value, told = "maybe", [f"{flag} 'maybe': it takes no value; type "]
        elif kind in ("INT", "FLOAT"):
            value, told = "maybe", [f"{flag} 'maybe' must be a"]
        elif kind == "PATH":
            value, told = "", [f"{flag} '' must be a path"]
        elif len(choices) > 1:
            value, told = "maybe", [f"{flag} 'maybe'", *(each for each in choices if each != "None")]
        else:
            continue  # of text any will do
        assert _main([*words, f"{flag}={value}"]) == 2
        said = capsys.readouterr().err
        assert all(each in said for each in told), said
        assert said.count("\n") == 1
        asked += 1
    assert asked


def test_help_of_a_verb_by_either_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert (_main(["help", "merge"]), _main(["merge", "--help"])) == (0, 0)
    first, second = capsys.readouterr().out.split("usage: ")[1:]
    assert first == second


@pytest.mark.parametrize("command", _MEANT)
def test_what_stands_for_a_word_can_be_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not set(_MEANT[command].split()) & set(VERBS)
    words = command.replace("RECIPE", "tiny-cpu").split()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("COLUMNS", "120")
        assert _main([*words, *(["--help"] if words[0] in VERBS else [])]) == 0
    flags = {word for word in words if word.startswith("--")} - {"--version"}
    assert flags <= flags_with_kinds(capsys.readouterr().out).keys()


def test_nothing_is_guessed_from_afar() -> None:
    assert perhaps("zzz", VERBS) == ""
    assert perhaps("gen", VERBS) == ", did you mean generate?"


def test_a_box_of_another_version_is_told_as_it_is() -> None:
    box = "╭─ Required options ─╮\n│ Missing from mobilellm x: --out PATH │\n╰────────────────────╯\n"
    assert complaint(box, "x", []) == (
        "x: Missing from mobilellm x: --out PATH (mobilellm x --help tells the arguments)"
    )
