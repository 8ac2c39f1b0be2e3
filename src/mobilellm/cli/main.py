"""`mobilellm VERB …`: a lazy table of verbs, so that `--help` answers without importing any of them.

A verb's module holds a dataclass `Arguments` (its fields are the flags) and `run(arguments)`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import sys
from collections.abc import Iterator, Sequence
from importlib import import_module
from typing import Any, TextIO, cast

from mobilellm import __version__
from mobilellm.cli.complaints import perhaps
from mobilellm.cli.guesses import command_for
from mobilellm.cli.parse import parse
from mobilellm.installation import EXTRAS, extras_with, install_command

VERBS = {
    "quickstart": "train, evaluate and talk to a small model on this machine, in minutes",
    "tokenizer": "train a tokenizer on your text",
    "prepare": "raw text of any size to token shards, on all cores, resumable",
    "train": "train by a recipe; the same command goes on where it stopped",
    "data": "look at conversations as a model is trained on them, or at the batch that stopped a run",
    "finetune": "teach a model to chat, to call functions: your conversations, the same loop",
    "info": "what a preset or a model is: parameters, bytes, cache, FLOPs",
    "cost": "days to train on given hardware, beside the published figures",
    "report": "draw a run, or several compared: pictures, one page, the numbers",
    "generate": "complete a prompt",
    "chat": "talk to a model in the terminal, or in a pipe",
    "serve": "answer over HTTP as OpenAI's interface has it, with a page to chat",
    "eval": "perplexity, zero-shot tasks, tool calling, chat; each by a protocol with a name",
    "shards": "look at, verify, merge token shards; to and from the layout of the reference's training code",
    "merge": "fold a LoRA adapter into the model it was trained on",
    "convert": "read any official layout, write one clean directory",
    "quantize": "8 or 4 bits a weight, and what that costs beside the model it was made from",
    "export": "a model as what a device runs, compared with its source before it gets its name",
    "web": "a folder that runs the model in the browser, with the page of serve",
    "verify": "compare what was exported with its source, in its own runtime",
    "bench": "tokens a second, start and memory on this machine, beside other runtimes",
}

_EXTRAS_OF_VERBS = {
    "train": "train", "finetune": "train", "eval": "eval", "merge": "finetune", "quantize": "export",
    "export": "export", "verify": "export", "web": "onnx",
}  # fmt: skip
"""Where one extra brings all a verb needs: else it would be told package by package."""

_WITH_A_WORD = {
    ("report", "artefacts"): "report_artefacts",
    ("tokenizer", "train"): "tokenizer",
    ("data", "show"): "data",
    ("data", "batch"): "data_batch",
}
"""Module of a verb whose first argument is this word."""
_NEED_A_WORD = {verb: word for (verb, word), module in _WITH_A_WORD.items() if module == verb}

_USAGE_ERROR, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 2 the caller's mistake (one line on stderr), 130 interrupted."""
    _open_what_is_closed()
    _show_what_cannot_be_encoded()
    sys.exit(_main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(arguments: list[str]) -> int:
    verb, code = (arguments or ["help"])[0], 0
    with contextlib.redirect_stdout(cast(TextIO, _StandardOutput(sys.stdout))):
        try:
            try:
                code = _dispatch(arguments)
            except SystemExit as stop:  # of --help, of a verb that was stopped
                code = stop.code if isinstance(stop.code, int) else 0
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return _INTERRUPTED
        except BrokenPipeError:  # the reader of a pipe has seen enough
            _silence(sys.stdout)
        except (ImportError, ValueError, OSError, MemoryError) as error:
            if isinstance(error, OSError) and error.filename == _StandardOutput.name:
                _silence(sys.stdout)
            if os.environ.get("MOBILELLM_DEBUG"):
                raise
            return _fail(_in_flags(error, verb, _with_flags(one_line(error, verb), arguments[1:])))
    return code


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and arguments[1:]:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
    elif arguments[0] in ("-V", "--version"):
        print(f"mobilellm {__version__}")
    elif arguments[0] not in VERBS:
        verb = arguments[0]
        if (meant := command_for(verb)) is not None:
            return _fail(f"{verb!r} is not a command; what does it is: {meant}")
        return _fail(
            f"{verb!r} is not a command{perhaps(verb, VERBS) or ';'} commands are {', '.join(VERBS)}"
        )
    else:
        _run(arguments[0], arguments[1:])
    return 0


def _run(verb: str, rest: list[str]) -> None:
    # torch's threads spin long at every barrier and starve beside one other busy process: training fell to a
    # sixth. Spinning briefly and then sleeping costs nothing on an idle machine and most of that is saved
    # (docs/log.md). OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    name = _WITH_A_WORD.get((verb, rest[0] if rest else ""))
    if name is not None:
        verb, rest = f"{verb} {rest[0]}", rest[1:]
    elif (word := _NEED_A_WORD.get(verb)) is not None:
        if not {"-h", "--help"} & set(rest):
            words = " or ".join(each for of, each in _WITH_A_WORD if of == verb)
            raise ValueError(f"{verb}: needs the word {words} first: mobilellm {verb} {word} …")
        name, verb = verb, f"{verb} {word}"
    module = import_module(f"mobilellm.cli.{name or verb.replace('-', '_')}")
    module.run(parse(verb, module, rest))


def _help() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: mobilellm VERB [arguments]   (mobilellm VERB --help tells a verb's arguments)",
            "",
            *lines,
            "",
            "MOBILELLM_DEBUG=1 in the environment shows the traceback of an error.",
        ]
    )


def _fail(message: str) -> int:
    try:
        print(f"mobilellm: error: {message}", file=sys.stderr, flush=True)
    except OSError:  # nowhere left to say it
        _silence(sys.stderr)
    return _USAGE_ERROR


def one_line(error: Exception, verb: str) -> str:
    """What went wrong, as the user reads it, and what is noted with it (PEP 678)."""
    return "; ".join([_of_the_error(error, verb), *getattr(error, "__notes__", ())])


def _of_the_error(error: Exception, verb: str) -> str:
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        if package in EXTRAS:
            extras = extras_with(package, _EXTRAS_OF_VERBS.get(verb))
            return f"{verb} needs the package {package!r}; install it with: {install_command(extras)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _with_flags(message: str, typed: Sequence[str]) -> str:
    """The library names its own parameters ("top_k = -5"); who typed --top-k -5 is told of --top-k."""
    for place, argument in enumerate(typed, 1):
        if argument.startswith("--"):
            flag, attached, value = argument.partition("=")
            following = itertools.takewhile(lambda each: not each.startswith("--"), typed[place:])
            name = flag[2:].replace("-", "_")
            names = "|".join(re.escape(each) for each in (name, name.rpartition(".")[2]))
            found = re.search(rf"(?<![\w.-])(?:{names}) = (\S+)", message)
            shown = found[1].rstrip(";,.)") if found else ""
            if found and any(_same_value(shown, each) for each in ([value] if attached else following)):
                message = f"{message[: found.start()]}{flag} {message[found.start(1) :]}"
    return message


def _in_flags(error: Exception, verb: str, message: str) -> str:
    """A verb whose flags are a recipe's fields knows them all."""
    told = getattr(sys.modules.get(f"mobilellm.cli.{verb}"), "in_flags", None)
    return message if told is None else str(told(error, message))


def _same_value(shown: str, typed: str) -> bool:
    if shown.strip("'\"") == typed:
        return True
    with contextlib.suppress(ValueError):
        return float(shown) == float(typed)
    return False


def _open_what_is_closed() -> None:
    """Started with a closed stream, write into nothing: else the next file opened would take its place."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            descriptor = os.open(os.devnull, os.O_RDWR)
            if descriptor != number:
                os.dup2(descriptor, number)
                os.close(descriptor)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def _show_what_cannot_be_encoded() -> None:
    """On a terminal that is not UTF-8, or in a file's name that is no text: \\x…, in place of an error."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


class _StandardOutput:
    """A stream whose errors say which stream it was: that of a full disk names no file."""

    name = "standard output"

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._named():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._named():
            self._stream.flush()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.name) from None


def _silence(stream: TextIO) -> None:
    """Let what is still in the stream's buffer go nowhere: at exit Python would complain of it again."""
    with contextlib.suppress(OSError, ValueError):  # of a stream without a file, in tests
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
