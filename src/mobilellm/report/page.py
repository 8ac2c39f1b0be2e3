"""Self-contained HTML pages about runs: no script, no outside host, readable on a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 46rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
p.lead { margin-top: 0; opacity: .8; }
table { border-collapse: collapse; } td, th { padding: .2rem .9rem .2rem 0; text-align: left; }
td + td, th + th { text-align: right; font-variant-numeric: tabular-nums; }
tr { border-bottom: 1px solid #8884; } img { max-width: 100%; background: #fff; border-radius: 6px; }
pre { background: #8881; padding: .8rem 1rem; border-radius: 6px; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def run_page(
    title: str,
    lead: str,
    results: Sequence[Sequence[str]],
    facts: Mapping[str, str],
    picture: bytes,
    samples: Sequence[tuple[str, str]],
    commands: Sequence[str],
) -> str:
    """The page of a run. `results` is a table with its header row first; `samples` are prompt and completion.

    Everything is escaped: a model may say anything.
    """
    encoded = base64.b64encode(picture).decode("ascii")
    spoken = "".join(
        f"<pre><b>{html.escape(prompt)}</b>{html.escape(completion)}</pre>" for prompt, completion in samples
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="lead">{html.escape(lead)}</p>'
        f"<h2>Results</h2>{_table(results)}"
        f'<h2>Loss</h2><img alt="loss over tokens" src="data:image/png;base64,{encoded}">'
        f"<h2>It says</h2>{spoken}"
        f"<h2>How it was made</h2>{_table([('', ''), *facts.items()])}"
        f"<h2>Go on</h2><pre>{html.escape(chr(10).join(commands))}</pre></body></html>\n"
    )


_REPORT_STYLE = """
:root { color-scheme: light dark; --line: #8883; --box: #8881; }
:root { --paper: #fff; --ink: #1c2430; --faint: #5b6675; }
@media (prefers-color-scheme: dark) { :root { --paper: #15181e; --ink: #e6e9ee; --faint: #9aa4b2; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto; }
body { max-width: 66rem; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .6rem; } h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.lead, figcaption, .note { color: var(--faint); } .lead { margin: 0; }
figcaption, .note { font-size: .85rem; line-height: 1.4; margin-top: .2rem; } .note { max-width: 46rem; }
figure { margin: 0; min-width: 0; } figure h2, figure h3 { margin: .4rem 0 .3rem; }
img { display: block; width: 100%; height: auto; }
.small { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: 1.6rem; }
.small { margin-top: 1.6rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem 0 .3rem 1.6rem; text-align: right; border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; max-width: 16rem; overflow-wrap: anywhere; } td:first-child { color: var(--faint); }
th + th { min-width: 6.5rem; vertical-align: bottom; }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); min-width: 6rem; }
.names { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; margin: .6rem 0 1.2rem; }
.names { padding: 0; }
.names li { display: flex; align-items: center; min-width: 0; overflow-wrap: anywhere; font-size: .9rem; }
.names i { flex: none; width: 1.6rem; margin-right: .5rem; border-top: 3px var(--light); }
@media (prefers-color-scheme: dark) { .names i { border-top-color: var(--dark); } }
pre { background: var(--box); padding: .7rem .9rem; border-radius: 6px; margin: .5rem 0; font-size: .9rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; } summary { cursor: pointer; margin: .6rem 0; }
@media (max-width: 30rem) { body { padding: 1rem .9rem 3rem; } }
@media (max-width: 30rem) { td, th { padding-left: .9rem; font-size: .9rem; } }
"""


@dataclass(frozen=True)
class Name:
    """Of a run, and how its line looks: its colour on light and dark pages, and a style of CSS's borders."""

    text: str
    light: str
    dark: str
    style: str


@dataclass(frozen=True)
class Picture:
    """A panel drawn for light and dark pages; `narrow` ones for phones, where the picture is a wide one."""

    title: str
    caption: str
    alternative: str
    """What it shows, in words."""
    light: bytes
    dark: bytes
    narrow_light: bytes | None = None
    narrow_dark: bytes | None = None


def report_page(
    title: str,
    lead: str,
    pictures: Sequence[Picture],
    numbers: Sequence[Sequence[str]],
    notes: Sequence[str],
    recipe: tuple[str, Sequence[Sequence[str]]],
    samples: Sequence[tuple[str, Sequence[tuple[str, str]]]],
    names: Sequence[Name] = (),
) -> str:
    """The page of one run or several compared, whose `names` then tell which line is whose. Tables come with
    their header row first.

    The first picture is drawn large, the others in rows. `recipe` is a heading and a table, which stays
    closed until asked for when long. `samples` are headings with prompts and completions. Everything is
    escaped.
    """
    large, small = pictures[:1], pictures[1:]
    heading, fields = recipe
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="lead">{html.escape(lead)}</p>' if lead else "",
        f'<ul class="names">{"".join(map(_name, names))}</ul>' if names else "",
        *(_figure(picture, "lone") for picture in large),
        f'<div class="small">{"".join(_figure(picture, "") for picture in small)}</div>' if small else "",
        f'<h2>Numbers</h2><div class="scroll">{_table(numbers)}</div>',
        *(f'<p class="note">{html.escape(note)}</p>' for note in notes),
    ]
    if fields:
        table = f'<div class="scroll">{_table(fields)}</div>'
        if len(fields) > _LONG_TABLE:
            table = f"<details><summary>{len(fields) - 1} fields</summary>{table}</details>"
        body.append(f"<h2>{html.escape(heading)}</h2>{table}")
    if samples:
        body.append("<h2>It says</h2>")
    for said, texts in samples:
        body.append(f"<h3>{html.escape(said)}</h3>")
        body += [f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in texts]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_REPORT_STYLE}</style></head><body>"
        f"{''.join(body)}</body></html>\n"
    )


_LONG_TABLE = 24


def _name(name: Name) -> str:
    line = f"--light: {name.light}; --dark: {name.dark}; border-top-style: {name.style}"
    return f'<li><i style="{html.escape(line)}"></i>{html.escape(name.text)}</li>'


def _figure(picture: Picture, kind: str) -> str:
    sources = ""
    if picture.narrow_light is not None and picture.narrow_dark is not None:
        narrow = "(max-width: 44rem)"
        sources += _source(f"{narrow} and (prefers-color-scheme: dark)", picture.narrow_dark)
        sources += _source(narrow, picture.narrow_light)
    sources += _source("(prefers-color-scheme: dark)", picture.dark)
    level = "h2" if kind else "h3"
    opened = f'<figure class="{kind}">' if kind else "<figure>"
    return (
        f"{opened}<{level}>{html.escape(picture.title)}</{level}><picture>{sources}"
        f'<img alt="{html.escape(picture.alternative)}" src="{_data(picture.light)}"></picture>'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>"
    )


def _source(condition: str, png: bytes) -> str:
    return f'<source media="{condition}" srcset="{_data(png)}">'


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    return f"<table><tr>{cells}</tr>{lines}</table>"
