"""`mobilellm VERB …`: a lazy table of verbs, so that `--help` answers without importing any of them.

A verb's module holds a dataclass `Arguments` (its fields are the flags) and `run(arguments)`.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

from mobilellm import __version__

VERBS = {
    "quickstart": "train, evaluate and talk to a small model on this machine, in minutes",
    "tokenizer": "train a tokenizer on your text",
    "prepare": "raw text of any size to token shards, on all cores, resumable",
    "train": "pretrain by a recipe; the same command goes on where it stopped",
    "info": "what a preset or a model is: parameters, bytes, cache, FLOPs",
    "cost": "days to train on given hardware, beside the published figures",
    "report": "draw a run, or several compared: pictures, one page, the numbers",
    "generate": "complete a prompt",
    "shards": "look at, verify, merge token shards; to and from the layout of the reference's training code",
    "convert": "read any official layout, write one clean directory",
}

_EXTRAS = {
    "torch": "torch", "matplotlib": "plots", "transformers": "hf", "pyarrow": "data", "zstandard": "data",
    "datasets": "data", "datasketch": "data",
}  # fmt: skip
_USAGE_ERROR, _INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb and exit: 0 done, 2 the caller's mistake (one line on stderr), 130 interrupted."""
    sys.exit(_main(list(sys.argv[1:] if arguments is None else arguments)))


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"mobilellm {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb not in VERBS:
        return _fail(f"{verb!r} is not a command; commands are {', '.join(VERBS)}")
    try:
        _run(verb, rest)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ModuleNotFoundError, ValueError, OSError) as error:
        if os.environ.get("MOBILELLM_DEBUG"):
            raise
        return _fail(_one_line(error, verb))
    return 0


def _run(verb: str, rest: list[str]) -> None:
    # torch's threads spin long at every barrier and starve beside one other busy process: training fell to a
    # sixth. Spinning briefly and then sleeping costs nothing on an idle machine and most of that is saved
    # (docs/log.md). OpenMP reads this when torch is imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    module = import_module(f"mobilellm.cli.{verb.replace('-', '_')}")
    module.run(_parse(verb, module, rest))


def _parse(verb: str, module: ModuleType, rest: list[str]) -> Any:
    """The verb's Arguments. tyro boxes its complaints; ours are one line, so the box is read and unfolded."""
    import tyro

    # A recipe's values are the defaults of its flags.
    options = {"default": module.default_arguments(rest)} if hasattr(module, "default_arguments") else {}
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                module.Arguments, prog=f"mobilellm {verb}", description=module.__doc__, args=rest, **options
            )
    except SystemExit as stop:
        if not stop.code:
            raise
    lines = [line.strip(" │") for line in box.getvalue().splitlines()]
    below_the_title = itertools.dropwhile(_is_rule, lines[1:])  # without box characters it is underlined
    said = [line for line in itertools.takewhile(lambda line: not _is_rule(line), below_the_title) if line]
    raise ValueError(f"{verb}: {' '.join(said)} (mobilellm {verb} --help tells the arguments)")


def _is_rule(line: str) -> bool:
    return line != "" and not line.strip("─-")


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
    print(f"mobilellm: error: {message}", file=sys.stderr)
    return _USAGE_ERROR


def _one_line(error: Exception, verb: str) -> str:
    if isinstance(error, ModuleNotFoundError):
        package = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(package, "all")
        return f"{verb} needs the package {package!r}; install it with: pip install 'mobilellm[{extra}]'"
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__
