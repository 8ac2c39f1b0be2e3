"""Talk to a model: in a terminal line by line, in a pipe one answer to what comes in.

MODEL is a .gguf file, a directory for ONNX Runtime or ExecuTorch, a model directory, a training run or a Hub
id. A model with a chat template answers; a base model continues the text, and says so. In the terminal /help
tells the commands.
"""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from mobilellm.chat.commands import Room
from mobilellm.chat.settings import SAMPLING, ContextEnd, Settings
from mobilellm.chat.speakers import open_speaker
from mobilellm.chat.talk import Answer, Talk
from mobilellm.chat.visible import visible
from mobilellm.cli.engine_flags import KVCache, Threads
from mobilellm.cli.notices import say
from mobilellm.sampling import Sampling


@dataclass
class Arguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """.gguf file, directory for ONNX Runtime or ExecuTorch, model directory, training run, Hub id."""
    message: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Say this, print the answer, and end; may be given several times. Else standard input, where it is no
    terminal, is the message."""
    system: str | None = None
    """What the model is told before the conversation."""
    load: Path | None = None
    """Go on with the conversation in this file."""
    save: Path | None = None
    """Keep the conversation in this file at the end, as finetune reads it."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = SAMPLING
    max_tokens: int | None = None
    """Most tokens of an answer; by default up to the model's context."""
    context: ContextEnd = "slide"
    """Where not all fits the model's context: leave out the oldest messages (slide), or refuse to go on."""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End an answer at this text and leave it out; may be given several times."""
    threads: Threads = None
    kv_cache: KVCache = "f16"
    json: bool = False
    """Print one JSON object for every answer instead of streaming."""


def run(arguments: Arguments) -> None:
    in_a_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not arguments.message
    if arguments.json and in_a_terminal:
        raise ValueError("json goes with --message or a pipe; a terminal is talked to in words")
    settings = Settings(
        sampling=arguments.sampling,
        max_tokens=arguments.max_tokens,
        context=arguments.context,
        stop=arguments.stop,
    )
    speaker = open_speaker(arguments.model, arguments.threads, say, arguments.kv_cache)
    talk = Talk(speaker, settings)
    room = Room(talk, say)
    if arguments.load is not None:
        room.load(arguments.load)
    if arguments.system is not None:
        talk.set_system(arguments.system)
    if arguments.save is not None:
        room.check_free(arguments.save)
    try:
        if in_a_terminal:
            _converse(room)
        else:
            if not talk.is_chat:
                say(f"{arguments.model} is a base model: it continues the text instead of answering it")
            for message in arguments.message or (_message(),):
                _answer(talk, message, arguments.json)
    finally:  # also of what was said by the time of a Ctrl-C
        if arguments.save is not None and talk.messages:
            room.save(arguments.save)


def _message() -> str:
    message = sys.stdin.read().removesuffix("\n")
    if not message:
        raise ValueError("chat: standard input is empty; write the message into it, or give --message")
    return message


def _converse(room: Room) -> None:
    from rich.console import Console

    from mobilellm.chat.reading import reader
    from mobilellm.chat.terminal import converse

    console = Console(file=sys.stdout, soft_wrap=True)
    converse(
        room, reader(lambda line: console.print(line, style="dim", markup=False, highlight=False)), console
    )


def _answer(talk: Talk, message: str, as_json: bool) -> None:
    answer = talk.ask(message)
    if answer.left_out:
        what = "messages" if talk.is_chat else "tokens"
        say(f"the oldest {answer.left_out} {what} do not fit the context and are left out")
    on_a_terminal = sys.stdout.isatty()
    with closing(iter(answer)) as pieces:
        for piece in pieces:
            if not as_json:
                print(visible(piece) if on_a_terminal else piece, end="", flush=True)
    if as_json:
        print(json.dumps(_described(answer, talk)), flush=True)
        return
    print(flush=True)
    if answer.finish == "context":
        say("the context is full: the answer is cut off")


def _described(answer: Answer, talk: Talk) -> dict[str, Any]:
    return {
        "message": talk.messages[-1],
        "is_chat": talk.is_chat,
        "finish": answer.finish,
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "reused_tokens": answer.reused,
            "completion_tokens": answer.tokens,
            "left_out": answer.left_out,
            "context": talk.speaker.context,
        },
        "timings": {
            "first_token_seconds": answer.first_token_seconds,
            "tokens_per_second": answer.tokens_per_second,
        },
        "settings": talk.settings.values(),
    }
