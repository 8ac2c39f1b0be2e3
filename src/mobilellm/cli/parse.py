"""The arguments of a verb, read by tyro; what it complains of, in one line."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

from mobilellm.cli.complaints import complaint, misused_flag

_FEWEST_COLUMNS = 40
"""On a terminal of a few columns tyro never ends, and takes all memory meanwhile."""
_TEXTS = ("--message", "--system", "--stop", "--prompt", "--sample.prompts", "--document-separator")
"""Flags of texts, in which a ~ is a ~."""
_LONGEST_FLAGS = 120
"""Columns in which no pair of flags is broken, and there is one panel beside no other."""


def parse(verb: str, module: ModuleType, typed: Sequence[str]) -> Any:
    """The verb's Arguments. Raises ValueError, one line, for what tyro would draw a box around."""
    import tyro

    typed = [_at_home(word) for word in typed]
    # A recipe's values are the defaults of its flags.
    options = {"default": module.default_arguments(typed)} if hasattr(module, "default_arguments") else {}

    def read(words: Sequence[str]) -> Any:
        return tyro.cli(
            module.Arguments, prog=f"mobilellm {verb}", description=module.__doc__, args=words, **options
        )

    def help_text() -> str:
        subcommand = [] if typed[0].startswith("-") else typed[:1]
        whole = io.StringIO()
        with contextlib.redirect_stdout(whole), _columns(_LONGEST_FLAGS), contextlib.suppress(SystemExit):
            read([*subcommand, "--help"])
        return whole.getvalue()

    if any("=" in word or not word for word in typed) and (misused := misused_flag(typed, help_text())):
        raise ValueError(misused)
    box, plain = io.StringIO(), io.StringIO()
    # tyro colours its help on a terminal whatever NO_COLOR says; what is no terminal it does not colour.
    uncoloured = contextlib.redirect_stdout(plain) if os.environ.get("NO_COLOR") else contextlib.nullcontext()
    columns = max(_FEWEST_COLUMNS, shutil.get_terminal_size().columns)
    try:
        with contextlib.redirect_stderr(box), uncoloured, _columns(columns):
            return read(typed)
    except SystemExit as stop:
        if not stop.code:
            print(plain.getvalue(), end="")
            raise
    raise ValueError(complaint(box.getvalue(), verb, typed, help_text))


def _at_home(word: str) -> str:
    """The shell leaves the ~ of --out=~/run as it is, and a folder of that name would be made."""
    flag, _, value = word.partition("=")
    is_path = flag[:2] == "--" and value[:2] == "~/" and flag not in _TEXTS
    return f"{flag}={os.path.expanduser(value)}" if is_path else word


@contextlib.contextmanager
def _columns(count: int) -> Iterator[None]:
    """tyro draws as wide as this says."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before
