"""Answers of several models to the same prompts on one page: no script, no outside host, fit for a phone."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mobilellm import __version__
from mobilellm.eval.chat import Answered

_STYLE = """
:root { color-scheme: light dark; --line: #d9dee5; --paper: #fff; --box: #f4f6f8; --ink: #1c2430; }
:root { --faint: #5b6675; --mine: #e8f0fe; --warn: #a8480d; }
@media (prefers-color-scheme: dark) {
  :root { --line: #343a45; --paper: #15181e; --box: #1e222a; --ink: #e6e9ee; --faint: #9aa4b2; }
  :root { --mine: #1f2c44; --warn: #f0a26b; }
}
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; }
body { max-width: 90rem; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.lead, .how, footer { color: var(--faint); font-size: .85rem; } .lead { margin: 0 0 1.5rem; }
section { border-top: 1px solid var(--line); padding: 1.2rem 0; }
h2 { font-size: .85rem; color: var(--faint); font-weight: 600; margin: 0 0 .5rem; }
h3 { font-size: .85rem; font-weight: 600; margin: 0 0 .3rem; overflow-wrap: anywhere; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.asked { background: var(--mine); border-radius: 8px; padding: .6rem .8rem; margin: 0 0 .6rem; }
.asked b { color: var(--faint); font-size: .75rem; font-weight: 600; display: block; }
.answers { display: grid; gap: .6rem; }
.answers { grid-template-columns: repeat(auto-fit, minmax(min(100%, 16rem), 1fr)); }
.answers article { background: var(--box); border-radius: 8px; padding: .6rem .8rem; min-width: 0; }
.reference { border: 1px dashed var(--line); background: none !important; }
.how { margin: .4rem 0 0; } .cut { color: var(--warn); }
"""
_ENDS = {
    "eos": "ended by itself",
    "length": "cut off at the limit",
    "context": "cut off where the context is full",
}


class Column(NamedTuple):
    """A model's name and its answers; the prompts of all columns are the same."""

    model: str
    answered: Sequence[Answered]


def sample_sheet(source: str, columns: Sequence[Column]) -> str:
    """The page. `source` names where the prompts are from.

    Everything is escaped: a model may say anything.
    """
    title = f"Answers to {source}"
    models = ", ".join(column.model for column in columns)
    sections = [
        _section(number, [column.answered[number] for column in columns], columns)
        for number in range(min(len(column.answered) for column in columns))
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{len(sections)} prompts, greedy answers: '
        f"{html.escape(models)}</p><main>{''.join(sections)}</main>"
        f"<footer>Made by mobilellm {__version__}.</footer></body></html>\n"
    )


def _section(number: int, answered: Sequence[Answered], columns: Sequence[Column]) -> str:
    asked = "".join(_message(message) for message in answered[0].messages)
    answers = "".join(_answer(column.model, each) for column, each in zip(columns, answered, strict=True))
    reference = html.escape(answered[0].reference)
    return (
        f'<section><h2>{number + 1}</h2><div class="asked">{asked}</div><div class="answers">{answers}'
        f'<article class="reference"><h3>reference</h3><p class="said">{reference}</p></article>'
        "</div></section>"
    )


def _message(message: Mapping[str, Any]) -> str:
    calls = [json.dumps(call["function"], ensure_ascii=False) for call in message.get("tool_calls") or ()]
    text = "\n".join([*filter(None, [message["content"]]), *calls])
    return f'<b>{html.escape(message["role"])}</b><p class="said">{html.escape(text)}</p>'


def _answer(model: str, each: Answered) -> str:
    if each.completion is None:
        text, how, is_cut = "", "not asked: the prompt fills the context", True
    else:
        text, finish = each.completion.text, each.completion.finish
        tokens = len(each.completion.tokens) - (finish == "eos")
        how, is_cut = f"{tokens:,} tokens, {_ENDS.get(finish, finish)}", finish != "eos"
    css = "how cut" if is_cut else "how"
    return (
        f'<article><h3>{html.escape(model)}</h3><p class="said">{html.escape(text)}</p>'
        f'<p class="{css}">{html.escape(how)}</p></article>'
    )
