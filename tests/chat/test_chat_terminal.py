"""The chat in a terminal, driven through a pseudo-terminal as a person would."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from chat_models import Parrot, small_tokenizer
from pseudo_terminal import CTRL_C, CTRL_D, ENTER, Terminal, python
from rich.console import Console

from absent_packages import without
from mobilellm.chat.commands import Room
from mobilellm.chat.conversation_file import read_conversation, write_conversation
from mobilellm.chat.reading import MORE, completions
from mobilellm.chat.talk import Talk
from mobilellm.chat.terminal import converse

ANSWERS = ["some", "words \x1b]0;owned\x07 x", *["all kinds of words"] * 20]
PROGRAM = """
import time
from rich.console import Console
from chat_models import Parrot, small_tokenizer
from mobilellm.chat.commands import Room
from mobilellm.chat.reading import reader
from mobilellm.chat.talk import Talk
from mobilellm.chat.terminal import converse

model = Parrot(small_tokenizer(), {answers!r}, {context}, **{options!r})
model.on_token = lambda number: time.sleep({pause})
console = Console(soft_wrap=True)
converse(Room(Talk(model), print), reader(console.print), console)
print("ended")
"""


def program(
    *before: str, answers: list[str] = ANSWERS, context: int = 900, pause: float = 0, **options: object
) -> list[str]:
    told = PROGRAM.format(answers=answers, context=context, pause=pause, options=options)
    return python(*before, told)


@pytest.fixture(params=["prompt_toolkit", "plain"])
def chat(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    absent = [] if request.param == "prompt_toolkit" else [without("prompt_toolkit")]
    if request.param == "prompt_toolkit":
        pytest.importorskip("prompt_toolkit", reason="needs the extra chat")
    with Terminal(program(*absent), tmp_path) as terminal:
        if absent:
            terminal.wait_for("prompt_toolkit is not installed")
        terminal.wait_for("> ")
        yield terminal


def ask(terminal: Terminal, line: str, until: str) -> str:
    """What is shown after a line, up to `until`; then the next line is waited for."""
    terminal.type(line + ENTER)
    shown = terminal.wait_for(until)
    if until != "ended":
        terminal.wait_for("> ")
    return shown


class Typed:
    """A reader of lines that are known."""

    def __init__(self, *lines: str) -> None:
        self._lines = iter(lines)

    def read(self) -> str:
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        return line


def test_files_named_on_the_command_line_are_the_conversations_own(tmp_path: Path) -> None:
    """/save writes over what --load read, and --save over what /save wrote."""
    loaded, saved = tmp_path / "loaded.json", tmp_path / "saved.json"
    write_conversation(loaded, [{"role": "user", "content": "more words"}])
    shown = StringIO()
    room = Room(Talk(Parrot(small_tokenizer(), ANSWERS, 900)), print)
    room.load(loaded)
    converse(room, Typed("words", f"/save {loaded}", f"/save {saved}", "/reset"), Console(file=shown))
    assert "error" not in shown.getvalue()
    assert len(read_conversation(loaded)) == len(read_conversation(saved)) == 3
    room.save(saved)
    assert read_conversation(saved) == []


def test_a_conversation_from_the_first_word_to_the_last(chat: Terminal, tmp_path: Path) -> None:
    assert "some" in ask(chat, "words", "of 900")
    shown = ask(chat, "more words", "of 900")
    assert "␛]0;owned␇" in shown
    assert "\x1b]0;" not in shown  # which would set the terminal's title
    assert "tokens/s" in shown
    ask(chat, "/system be kind", "The system message is set.")
    ask(chat, "/set temperature 0.25", "temperature = 0.25")
    assert "'hot'" in ask(chat, "/set temperature hot", "is no number")
    assert "/nonsense is no command" in ask(chat, "/nonsense", "to the model")
    shown = ask(chat, "/show", "assistant: words")
    assert "system: be kind" in shown
    assert "user: more words" in shown
    ask(chat, "/undo", "Taken back: more words")
    ask(chat, "/save talk.json", "3 messages saved")
    ask(chat, "/retry", "of 900")
    ask(chat, "/reset", "Forgotten all but the system message.")
    ask(chat, "/load talk.json", "3 messages loaded")
    ask(chat, "/save talk.json", "3 messages saved")  # its own file
    ask(chat, "/help", "Ctrl-D ends the chat.")
    chat.type(CTRL_D)
    chat.wait_for("ended")
    assert chat.exit_code() == 0
    assert read_conversation(tmp_path / "talk.json") == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "words"},
        {"role": "assistant", "content": "some"},
    ]
    assert len((tmp_path / "talk.json").read_text().splitlines()) == 1  # one line of a .jsonl file


def test_ctrl_c_empties_the_line_and_quit_ends(chat: Terminal) -> None:
    chat.type("half a thought")
    chat.wait_for("thought")
    # While it does not yet wait for a key again, Python tells of a signal only with the next one.
    chat.type_until(CTRL_C, "Ctrl-D, or /quit, ends the chat.")
    chat.wait_for("> ")
    ask(chat, "/show", "Nothing has been said.")
    ask(chat, "/quit", "ended")
    assert chat.exit_code() == 0


def test_several_lines_are_one_message(chat: Terminal) -> None:
    chat.type("one\\" + ENTER)
    chat.wait_for(MORE.strip())
    ask(chat, "two", "of 900")
    shown = ask(chat, "/show", "assistant: ")
    assert "user: one" in shown
    assert "two\x1b[0m\r\n" in shown


@pytest.mark.parametrize("toolkit", [True, False])
def test_ctrl_c_stops_the_answer_and_not_the_program(toolkit: bool, tmp_path: Path) -> None:
    long = ["all kinds of words " * 40]
    before = [] if toolkit else [without("prompt_toolkit")]
    with Terminal(program(*before, answers=long * 3, pause=0.02), tmp_path) as chat:
        chat.wait_for("> ")
        chat.type("words" + ENTER)
        chat.wait_for("all kinds")
        chat.type(CTRL_C)
        chat.wait_for("stopped")
        chat.wait_for("> ")
        ask(chat, "/show", "assistant: all kinds")
        chat.type(CTRL_D)
        chat.wait_for("ended")
        assert chat.exit_code() == 0


def test_history_is_kept_for_this_user_alone(tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit", reason="needs the extra chat")
    up = "\x1b[A"
    for again in (False, True):
        with Terminal(program(), tmp_path) as chat:
            chat.wait_for("> ")
            if again:
                chat.type_until(up, "/show")  # the file may still be read
                chat.type_until(up, "of the first time")
            else:
                chat.type("words of the first time")
            ask(chat, "", "of 900")
            ask(chat, "/show", "user: words of the first time")
            chat.type(CTRL_D)
            assert chat.exit_code() == 0
    (kept,) = (tmp_path / "state" / "mobilellm").iterdir()
    assert kept.stat().st_mode & 0o077 == 0


def test_tab_completes_commands_and_settings(tmp_path: Path) -> None:
    pytest.importorskip("prompt_toolkit", reason="needs the extra chat")
    with Terminal(program(), tmp_path) as chat:
        chat.wait_for("> ")
        for keys in ("/se\t", " temp\t", " 0.5" + ENTER):
            chat.type(keys)
            time.sleep(0.3)
        chat.wait_for("temperature = 0.5")


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talks").mkdir()
    (tmp_path / "talks" / "a.json").write_text("{}")
    assert completions("/re") == ["/reset", "/retry"]
    assert completions("/set top") == ["top_k", "top_p"]
    assert completions("/set context s") == ["slide"]
    assert completions("/load t") == ["talks/"]
    assert completions("/load talks/") == ["talks/a.json"]
    assert completions("/load nowhere/") == []
    assert completions("hello /re") == []


def test_a_base_model_says_so(tmp_path: Path) -> None:
    with Terminal(program(template=None), tmp_path) as chat:
        chat.wait_for("This is a base model: it has no chat template")
        chat.wait_for("> ")
        ask(chat, "some", "of 900")
        assert "has no chat template" in ask(chat, "/system x", "leave it out")
        ask(chat, "", "of 900")  # an empty line lets it go on


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    with Terminal(program(context=120), tmp_path) as chat:
        chat.wait_for("> ")
        for _ in range(8):
            ask(chat, "some more words", "of 120")
        assert "Not all fits the context of 120 tokens: the oldest" in chat.shown
        assert ask(chat, "words " * 100, "shorten it").count("error: ") == 1
        ask(chat, "/set context refuse", "context = refuse")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is not one conversation in JSON"),
        ("{}", "holds no conversation"),
        ('[{"role": "robot", "content": "x"}]', "role = 'robot' is not known"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content = 3 must be text"),
    ],
)
def test_files_that_hold_no_conversation(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=words) as refused:
        read_conversation(file)
    assert str(refused.value).startswith(f"{file}: ")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_conversation(tmp_path / "other.json")
    file.write_text(json.dumps([{"role": "user", "content": "x"}]))
    assert read_conversation(file) == [{"role": "user", "content": "x"}]
