"""One self-contained HTML page about one run: no script, no outside host, readable on a phone."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence

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


def _table(rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    head, *body = rows
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    return f"<table><tr>{cells}</tr>{lines}</table>"
