"""Complete a prompt (or several at once) and stream the text.

MODEL is a model directory, a training run, a Hub id, or a .gguf file, which needs no torch. Without a prompt,
standard input is the prompt.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

import tyro

from mobilellm.completion import completions as put_together
from mobilellm.sampling import Sampling

if TYPE_CHECKING:
    from mobilellm.model.api import LoadedModel
    from mobilellm.runtime.session import RuntimeModel


@dataclass
class Arguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Model directory, training run, Hub id (org/name), or .gguf file."""
    prompts: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PROMPT")] = ()
    """Texts to complete; several are one batch. None reads standard input."""
    max_tokens: int | None = None
    """Most new tokens for each prompt; by default up to the model's context."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = field(default_factory=Sampling)
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """End at this text and leave it out; may be given several times."""
    dtype: str | None = None
    """float32, bfloat16 or float16; by default as stored (float16 becomes float32 on a CPU)."""
    device: str = "cpu"
    """torch device, e.g. cpu or cuda."""
    threads: int | None = None
    """Of the runtime, for a .gguf file; by default one a fast core, four at most."""
    json: bool = False
    """Print one JSON object with every completion at the end instead of streaming."""


def run(arguments: Arguments) -> None:
    if arguments.max_tokens is not None and arguments.max_tokens < 1:
        raise ValueError(f"max_tokens = {arguments.max_tokens} must be at least 1")
    prompts = arguments.prompts or (sys.stdin.read().removesuffix("\n"),)
    loaded = _load(arguments)
    options = (arguments.sampling, arguments.max_tokens, arguments.stop)
    if arguments.json or len(prompts) > 1:
        completions = put_together(loaded.stream(prompts, *options), len(prompts))
        if arguments.json:
            rows = [
                {"prompt": prompt, **completion._asdict()}
                for prompt, completion in zip(prompts, completions, strict=True)
            ]
            print(json.dumps({"sampling": dataclasses.asdict(arguments.sampling), "completions": rows}))
        else:
            for prompt, completion in zip(prompts, completions, strict=True):
                print(f"{prompt}{completion.text}\n")
        return
    pieces, finish = loaded.stream(prompts[0], *options), None  # what is refused is refused before any output
    print(prompts[0], end="", flush=True)
    for piece in pieces:
        print(piece.text, end="", flush=True)
        finish = piece.finish
    print(flush=True)
    if finish == "context":
        _say("the model's context is full")


def _load(arguments: Arguments) -> LoadedModel | RuntimeModel:
    if not arguments.model.endswith(".gguf"):
        if arguments.threads is not None:
            raise ValueError(
                f"threads = {arguments.threads} is for .gguf files; for PyTorch set OMP_NUM_THREADS"
            )
        from mobilellm.model.api import load

        return load(arguments.model, arguments.dtype, arguments.device, say=_say)
    for name, value, only in (("dtype", arguments.dtype, None), ("device", arguments.device, "cpu")):
        if value != only:
            raise ValueError(
                f"{name} = {value} does not go with {arguments.model}, a .gguf file; leave it out"
            )
    from mobilellm.runtime.session import load as open_file

    return open_file(arguments.model, arguments.threads, say=_say)


def _say(message: str) -> None:
    print(f"mobilellm: {message}", file=sys.stderr)
