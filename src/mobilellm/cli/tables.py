"""Tables on standard output: laid out for the width of a terminal, in one piece in a pipe or a file."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_PAGE = 100  # columns
_UNLIMITED = 100_000  # rich would assume 80 columns for a pipe, and cut


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """One row a model. Too wide for the terminal, it goes on below, the first column repeated.

    Two columns that are too wide stay whole: the terminal breaks the line, and nothing is cut.
    """
    console = _console()
    rest = list(range(1, len(header)))
    while rest:
        if len(rest) < len(header) - 1:
            print()
        count = 1
        while count < len(rest) and _fits(console, _grid(header, rows, [0, *rest[: count + 1]])):
            count += 1
        grid = _grid(header, rows, [0, *rest[:count]])
        _show(console if _fits(console, grid) else _console(_UNLIMITED), grid)
        rest = rest[count:]


def print_worded_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As `print_table`, with words in the last column, which are broken into lines.

    It is no wider than a page, in a pipe too, and nothing is cut."""
    table = _grid(header, rows, range(len(header)))
    for column in table.columns:
        column.vertical, column.overflow = "top", "fold"
    table.columns[-1].justify = "left"
    console = _console()
    console.width = min(_PAGE, console.width)
    _show(console, table)


def print_sheet(rows: Sequence[tuple[str, str]]) -> None:
    """Names on the left, values on the right."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(Text(name, style="bold"), Text(value))
    _show(_console(), table)


def print_notes(notes: Sequence[str]) -> None:
    """A blank line, then one paragraph a note."""
    console = _console()
    for note in ("", *notes):
        _show(console, Text(note))


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]], columns: Sequence[int]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for column in columns:
        table.add_column(Text(header[column]), justify="right" if column else "left", vertical="bottom")
    for row in rows:
        table.add_row(*(Text(row[column]) for column in columns))
    return table


def _fits(console: Console, table: Table) -> bool:
    options = console.options.update(width=_UNLIMITED)
    return Measurement.get(console, options, table).maximum <= console.width


def _console(width: int | None = None) -> Console:
    """By default as wide as the terminal."""
    return Console(
        width=width if sys.stdout.isatty() else _UNLIMITED,
        highlight=False,
        color_system=None if os.environ.get("NO_COLOR") else "auto",  # else it would still print in bold
    )


def _show(console: Console, renderable: RenderableType) -> None:
    """Through print, because rich answers a closed pipe with exit code 1 and we with 0."""
    with console.capture() as capture:
        console.print(renderable)
    for line in capture.get().splitlines():
        print(line.rstrip())
