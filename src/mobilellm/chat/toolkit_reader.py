"""Lines typed with prompt_toolkit: edited, completed, several to a message, the history searched."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.auto_suggest import AutoSuggestFromHistory
from prompt_toolkit.completion import CompleteEvent, Completer, Completion
from prompt_toolkit.document import Document
from prompt_toolkit.formatted_text import FormattedText
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.shortcuts import CompleteStyle

from mobilellm.chat.reading import MORE, PROMPT, completions, make_private


class ToolkitReader:
    """See `Reader`."""

    def __init__(self, history: Path) -> None:
        kept: History = InMemoryHistory()
        with contextlib.suppress(OSError):  # a home that cannot be written to
            make_private(history)
            kept = FileHistory(str(history))
        self._session: PromptSession[str] = PromptSession(
            FormattedText([("bold ansigreen", PROMPT)]),
            history=kept, completer=_Words(), complete_while_typing=False,
            auto_suggest=AutoSuggestFromHistory(), key_bindings=_key_bindings(), multiline=True,
            prompt_continuation=MORE, complete_style=CompleteStyle.READLINE_LIKE, reserve_space_for_menu=0,
        )  # fmt: skip

    def read(self) -> str:
        return self._session.prompt()


class _Words(Completer):
    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        last = document.text_before_cursor.rpartition(" ")[2]
        for word in completions(document.text_before_cursor):
            yield Completion(word, start_position=-len(last))


def _key_bindings() -> KeyBindings:
    """Enter sends, unless the line ends with a backslash; Alt-Enter begins another line."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.current_line_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.newline(copy_margin=False)
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.newline(copy_margin=False)

    return bindings
