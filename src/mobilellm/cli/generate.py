"""Complete a prompt (or several at once) and stream the text.

MODEL is a model directory, a training run, a Hub id; a .gguf file, which needs no torch; or a directory for
ONNX Runtime or ExecuTorch. Without a prompt, standard input is the prompt. Models in PyTorch have --dtype and
--device, all others --context and --prompt-lookup; .gguf files have --threads, --kv-cache and --session, too.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from mobilellm.artefacts.opening import artefact_directory
from mobilellm.artefacts.text_model import open_text_model
from mobilellm.chat.visible import visible
from mobilellm.cli.engine_flags import KVCache, Threads
from mobilellm.cli.notices import say
from mobilellm.completion import Piece
from mobilellm.completion import completions as put_together
from mobilellm.runtime.decoding import Decoding
from mobilellm.sampling import Sampling


@dataclass
class Arguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Model directory, training run, Hub id, .gguf file, or directory for ONNX Runtime or ExecuTorch."""
    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT")] = ()
    """Texts to complete; several are one batch. None, or -, reads standard input."""
    max_tokens: int | None = None
    """Most new tokens for each prompt; by default up to the model's context."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End at this text and leave it out; may be given several times."""
    dtype: str | None = None
    """float32, bfloat16 or float16; by default as stored (float16 becomes float32 on a CPU)."""
    device: str = "cpu"
    """torch device, e.g. cpu or cuda."""
    decoding: Annotated[Decoding, tyro.conf.arg(name="")] = field(default_factory=Decoding)
    threads: Threads = None
    kv_cache: KVCache = "f16"
    session: Path | None = None
    """Keep what was read in this file; of a later prompt that begins alike, only the rest is computed."""
    json: bool = False
    """Print one JSON object with every completion at the end instead of streaming."""


def run(arguments: Arguments) -> None:
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise ValueError(f"max_tokens = {arguments.max_tokens} must be at least 1")
    from_input = arguments.prompts in ((), ("-",))
    prompts = (sys.stdin.read().removesuffix("\n"),) if from_input else arguments.prompts
    with _opened(arguments, prompts) as (pieces, usage):
        if arguments.json or len(prompts) > 1:
            completions = put_together(pieces, len(prompts))
            if arguments.json:
                rows = [
                    {"prompt": prompt, **completion._asdict(), **usage()}
                    for prompt, completion in zip(prompts, completions, strict=True)
                ]
                print(json.dumps({"sampling": dataclasses.asdict(arguments.sampling), "completions": rows}))
            else:
                for prompt, completion in zip(prompts, completions, strict=True):
                    print(f"{prompt}{completion.text}\n")
        else:
            _show(prompts[0], pieces)


def _show(prompt: str, pieces: Iterator[Piece]) -> None:
    print(prompt, end="", flush=True)
    finish = None
    in_a_terminal = sys.stdout.isatty()
    for piece in pieces:
        print(visible(piece.text) if in_a_terminal else piece.text, end="", flush=True)
        finish = piece.finish
    print(flush=True)
    if finish == "context":
        say("the model's context is full")


@contextmanager
def _opened(
    arguments: Arguments, prompts: Sequence[str]
) -> Iterator[tuple[Iterator[Piece], Callable[[], dict[str, Any]]]]:
    """The pieces of all prompts, and what they cost, where that is known. What is refused is refused here."""
    options = (arguments.sampling, arguments.max_tokens, arguments.stop)
    is_file, is_artefact = arguments.model.endswith(".gguf"), artefact_directory(arguments.model) is not None
    if not is_file:
        _refuse([("threads", arguments.threads, None)], "is for .gguf files; for PyTorch set OMP_NUM_THREADS")
        _refuse([("kv_cache", arguments.kv_cache, "f16")], "is for .gguf files; leave it out")
        _refuse([("session", arguments.session, None)], "is for .gguf files; leave it out")
    if not is_file and not is_artefact:
        decoding = [
            (each.name, getattr(arguments.decoding, each.name), each.default)
            for each in dataclasses.fields(Decoding)
        ]
        _refuse(decoding, "is for .gguf files; leave it out")
        from mobilellm.model.api import load

        loaded = load(arguments.model, arguments.dtype, arguments.device, say=say)
        _tell_of_chat(loaded.chat_template)
        yield loaded.stream(prompts, *options), dict
        return
    _refuse(
        [("dtype", arguments.dtype, None), ("device", arguments.device, "cpu")],
        f"does not go with {arguments.model}, {'a .gguf file' if is_file else 'which runs as it is stored'}; "
        "leave it out",
    )
    if arguments.session is not None and len(prompts) > 1:
        raise ValueError(f"session = {arguments.session} goes with one prompt; {len(prompts)} were given")
    model = open_text_model(arguments.model, arguments.threads, say, arguments.kv_cache)
    _tell_of_chat(model.chat_template)
    if len(prompts) > 1:
        yield model.stream(prompts, *options, arguments.decoding), dict
        return
    session = model.session()
    if arguments.session is not None and arguments.session.exists():
        session.restore(arguments.session)
    pieces = session.stream(prompts[0], *options, arguments.decoding)
    try:
        yield pieces, lambda: {"usage": dataclasses.asdict(session.usage)} if session.usage else {}
    finally:  # also of what was read by the time of a Ctrl-C
        if arguments.session is not None:
            session.save(arguments.session)


def _tell_of_chat(template: str | None) -> None:
    """Who completes a text in a terminal may not know that the model would answer."""
    if template is not None and sys.stdout.isatty():
        say("this model has a chat template: mobilellm chat talks to it; here it continues the text")


def _refuse(options: Iterable[tuple[str, object, object]], why: str) -> None:
    """Refuse what would do nothing for this kind of model: (name, value, default)."""
    for name, value, default in options:
        if value != default:
            raise ValueError(f"{name} = {value} {why}")
