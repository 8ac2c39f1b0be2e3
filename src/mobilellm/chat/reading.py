"""Lines that a person types: with prompt_toolkit, or by the plain input of Python where that is missing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from mobilellm.chat.commands import COMMANDS
from mobilellm.chat.settings import NAMES
from mobilellm.installation import install_command, missing_packages

PROMPT, MORE = "> ", ". "


class Reader(Protocol):
    def read(self) -> str:
        """A message or a command, possibly of several lines. Raises EOFError, KeyboardInterrupt."""


def reader(say: Callable[[str], None]) -> Reader:
    """What this installation has. History is kept in a file of this user alone."""
    if missing_packages("prompt_toolkit"):
        say(
            "prompt_toolkit is not installed: lines are edited and completed plainly; "
            f"install it with: {install_command('chat')}"
        )
        return PlainReader(_state() / "chat-history.txt")
    from mobilellm.chat.toolkit_reader import ToolkitReader

    return ToolkitReader(_state() / "chat-history")


def completions(line: str) -> list[str]:
    """The words that the last word of a command line may become."""
    command, space, rest = line.partition(" ")
    if not line.startswith("/"):
        return []
    if not space:
        return [name for name in COMMANDS if name.startswith(command)]
    if command == "/set" and " " not in rest:
        return [name for name in NAMES if name.startswith(rest)]
    if command == "/set" and rest.startswith("context "):
        return [each for each in ("slide", "refuse") if each.startswith(rest.removeprefix("context "))]
    if command in ("/save", "/load"):
        return _files(rest)
    return []


class PlainReader:
    """See `Reader`. With readline where Python has it."""

    def __init__(self, history: Path) -> None:
        with contextlib.suppress(ImportError):
            import atexit
            import readline

            with contextlib.suppress(OSError):
                readline.read_history_file(history)
            readline.set_completer_delims(" \n")
            readline.set_completer(_completer(readline.get_line_buffer))
            readline.parse_and_bind("tab: complete")

            def keep() -> None:
                with contextlib.suppress(OSError):  # a home that cannot be written to
                    make_private(history)
                    readline.write_history_file(history)

            atexit.register(keep)

    def read(self) -> str:
        lines = [input(PROMPT)]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(input(MORE))
        return "\n".join(lines)


def make_private(file: Path) -> None:
    """A file that only this user can read. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch(mode=0o600)


def _state() -> Path:
    """`mobilellm` in $XDG_STATE_HOME, or in ~/.local/state. The XDG standard has a relative path ignored."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    return (named if named.is_absolute() else Path.home() / ".local" / "state") / "mobilellm"


def _files(typed: str) -> list[str]:
    folder, _, name = typed.rpartition("/")
    place = Path(folder or ("/" if typed.startswith("/") else ".")).expanduser()
    before = typed[: len(typed) - len(name)]
    with contextlib.suppress(OSError):
        return sorted(
            f"{before}{file.name}{'/' if file.is_dir() else ''}"
            for file in place.iterdir()
            if file.name.startswith(name) and (name or not file.name.startswith("."))
        )
    return []


def _completer(line: Callable[[], str]) -> Callable[[str, int], str | None]:
    def complete(text: str, number: int) -> str | None:
        found = completions(line())
        return found[number] if number < len(found) else None

    return complete
