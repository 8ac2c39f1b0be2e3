"""What can be typed in a chat beside messages: a table of commands, each a function of the conversation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

from mobilellm.atomic import check_writable
from mobilellm.chat.conversation_file import read_conversation, write_conversation
from mobilellm.chat.settings import NAMES, changed, shown
from mobilellm.chat.talk import Talk

Next = Literal["go on", "again", "quit"]
"""After a command: read the next line, answer the text in `Room.again`, or end."""


class Command(NamedTuple):
    arguments: str
    told: str
    run: Callable[[Room, str], Next]


class Room:
    """A conversation and the place where commands tell what they did."""

    def __init__(self, talk: Talk, say: Callable[[str], None]) -> None:
        self.talk, self.say = talk, say
        self.again = ""
        """What is to be answered anew."""
        self._own_files: set[Path] = set()
        """Written or read here: these may be written over."""

    def check_free(self, path: Path) -> None:
        """Raises FileExistsError for a file that this conversation did not come from or go to, OSError where
        none can be written."""
        if path.exists() and path.resolve() not in self._own_files:
            raise FileExistsError(f"{path}: exists; choose another name")
        check_writable(path)

    def save(self, path: Path) -> None:
        """Raises what `check_free` raises."""
        self.check_free(path)
        write_conversation(path, self.talk.messages)
        self._own_files.add(path.resolve())

    def load(self, path: Path) -> None:
        self.talk.replace(read_conversation(path))
        self._own_files.add(path.resolve())


def obey(room: Room, line: str) -> Next:
    """Run a line that begins with a slash. Raises ValueError or OSError, one line, for what it cannot do."""
    word, _, rest = line.partition(" ")
    name = _ALSO.get(word, word)
    if name not in COMMANDS:
        raise ValueError(
            f"{word} is no command; /help tells them, and //{line[1:]} says it to the model as /{line[1:]}"
        )
    return COMMANDS[name].run(room, rest.strip())


def _help(room: Room, rest: str) -> Next:
    width = max(len(f"{name} {command.arguments}") for name, command in COMMANDS.items())
    for name, command in COMMANDS.items():
        room.say(f"{f'{name} {command.arguments}':<{width}}  {command.told}")
    room.say("Alt-Enter, or a \\ at the end of a line, begins another line of the same message.")
    room.say("Ctrl-C stops an answer; Ctrl-D ends the chat.")
    return "go on"


def _system(room: Room, text: str) -> Next:
    if text:
        room.talk.set_system(None if text == "none" else text)
        room.say("The system message is taken away." if text == "none" else "The system message is set.")
    else:
        room.say(room.talk.system or "There is no system message.")
    return "go on"


def _reset(room: Room, rest: str) -> Next:
    room.talk.reset()
    room.say("Forgotten all but the system message." if room.talk.system else "Forgotten.")
    return "go on"


def _undo(room: Room, rest: str) -> Next:
    text = room.talk.take_back()
    room.say("There is nothing to take back." if text is None else f"Taken back: {text}")
    return "go on"


def _retry(room: Room, rest: str) -> Next:
    text = room.talk.take_back()
    if text is None:
        raise ValueError("there is no answer yet to be given anew")
    room.again = text
    return "again"


def _save(room: Room, rest: str) -> Next:
    room.save(_path(rest, "/save"))
    count = len(room.talk.messages)
    room.say(f"{count} message{'s' * (count != 1)} saved; mobilellm finetune reads them, and /load.")
    return "go on"


def _load(room: Room, rest: str) -> Next:
    room.load(_path(rest, "/load"))
    room.say(f"{len(room.talk.messages)} messages loaded; /show tells them.")
    return "go on"


def _set(room: Room, rest: str) -> Next:
    name, _, value = rest.partition(" ")
    if not name:
        return _settings(room)
    if not value:
        raise ValueError(f"/set {name} needs a value; settings are {', '.join(NAMES)}")
    room.talk.settings = changed(room.talk.settings, name, value)
    return _settings(room, name)


def _settings(room: Room, only: str | None = None) -> Next:
    values = room.talk.settings.values()
    names = NAMES if only is None else (only.replace("-", "_").lower(),)
    for name in names:
        room.say(f"{name} = {shown(values[name])}")
    return "go on"


def _show(room: Room, rest: str) -> Next:
    if not room.talk.messages:
        room.say("Nothing has been said.")
    for message in room.talk.messages:
        room.say(f"{message['role']}: {message['content']}")
    return "go on"


def _quit(room: Room, rest: str) -> Next:
    return "quit"


def _path(text: str, command: str) -> Path:
    if not text:
        raise ValueError(f"{command} needs a file name")
    return Path(text).expanduser()


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/system": Command("[TEXT]", "tell or set the system message; none takes it away", _system),
    "/reset": Command("", "forget the conversation, keep system message and settings", _reset),
    "/undo": Command("", "take the last message back, and its answer", _undo),
    "/retry": Command("", "have the last message answered anew", _retry),
    "/save": Command("FILE", "keep the conversation, as finetune reads it", _save),
    "/load": Command("FILE", "go on with a conversation that was kept", _load),
    "/set": Command("[NAME VALUE]", "tell the settings, or change one", _set),
    "/show": Command("", "tell the conversation", _show),
    "/quit": Command("", "end, as Ctrl-D does", _quit),
}
_ALSO = {"/exit": "/quit", "/?": "/help"}
