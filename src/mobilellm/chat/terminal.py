"""A chat in a terminal: what is typed, what is answered, what it cost, until the end."""

from __future__ import annotations

from contextlib import closing

from rich.console import Console

from mobilellm.chat.commands import Room, obey
from mobilellm.chat.reading import Reader
from mobilellm.chat.talk import Answer
from mobilellm.chat.visible import visible


def converse(room: Room, reader: Reader, console: Console) -> None:
    """Read and answer until Ctrl-D or /quit. Ctrl-C stops an answer, or empties the line, and no more.

    A mistake of the caller's costs a line. From now on `room` tells what commands did in the terminal.
    """
    terminal = _Terminal(room, console)
    terminal.greet()
    going = True
    while going:
        try:
            going = terminal.take(reader.read())
        except KeyboardInterrupt:
            terminal.say("Ctrl-D, or /quit, ends the chat.")
        except EOFError:
            console.print()
            going = False
        except (ValueError, OSError) as error:
            console.print(visible(f"error: {error}"), style="red", markup=False, highlight=False)


class _Terminal:
    def __init__(self, room: Room, console: Console) -> None:
        self._room, self._talk, self._console = room, room.talk, console
        room.say = self.say
        self._left_out = 0

    def say(self, text: str) -> None:
        """A line that is not the model's."""
        self._console.print(visible(text), style="dim", markup=False, highlight=False)

    def greet(self) -> None:
        speaker = self._talk.speaker
        self.say(f"{speaker.source} · {speaker.runs_in} · context {speaker.context:,} tokens")
        if not self._talk.is_chat:
            self.say(
                "This is a base model: it has no chat template, and goes on with the text you write instead "
                "of answering it. An empty line lets it go on; /reset begins a new text."
            )
        self.say("/help tells the commands. Ctrl-C stops an answer, Ctrl-D ends.")

    def take(self, line: str) -> bool:
        """Obey a command, or have a message answered; False after /quit."""
        if line.startswith("/") and not line.startswith("//"):
            following = obey(self._room, line)
            if following != "again":
                return following != "quit"
            line = self._room.again
        else:
            line = line.removeprefix("/") if line.startswith("//") else line
        if line.strip() or not self._talk.is_chat:
            self._answer(line)
        return True

    def _answer(self, line: str) -> None:
        answer = self._talk.ask(line)
        if answer.left_out > self._left_out:
            what = "messages" if self._talk.is_chat else "tokens"
            self.say(
                f"Not all fits the context of {self._talk.speaker.context:,} tokens: the oldest "
                f"{answer.left_out} {what} are left out from now on."
            )
        self._left_out = answer.left_out
        stream = self._console.file
        try:
            with closing(iter(answer)) as pieces:
                for piece in pieces:
                    stream.write(visible(piece))
                    stream.flush()
        except KeyboardInterrupt:
            pass  # what there is stays; `cost` says that it was stopped
        self._console.print()
        self.say(cost(answer, self._talk.speaker.context))


def cost(answer: Answer, context: int) -> str:
    """What an answer took, in one line."""
    rate, first = answer.tokens_per_second, answer.first_token_seconds
    parts = [f"{answer.tokens} {'token' if answer.tokens == 1 else 'tokens'}"]
    if rate is not None:
        parts.append(f"{rate:,.0f} tokens/s")
    if first is not None:
        parts.append(f"first after {first:.2f} s")
    parts.append(f"context {answer.prompt_tokens + answer.tokens:,} of {context:,}")
    if answer.finish in _ENDS:
        parts.append(_ENDS[answer.finish])
    return " · ".join(parts)


_ENDS = {
    "cancelled": "stopped",
    "length": "cut off at max_tokens",
    "context": "cut off: the context is full",
}
"""What is worth saying of how an answer ended."""
