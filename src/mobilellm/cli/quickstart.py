"""Train, evaluate and talk to a small deep-and-thin model with layer sharing, on this machine, in minutes.

Text -> tokenizer -> shards -> pretraining -> held-out perplexity -> report -> a streamed completion. The text
is the documentation that every Python installation carries, or your own with --text. Stop it at any moment;
the same command goes on where it was.
"""

from __future__ import annotations

import contextlib
import platform
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mobilellm.cli.notices import say
from mobilellm.cli.quickstart_folder import (
    check_resumable,
    claimed,
    finished_results,
    what_is_kept,
)
from mobilellm.cli.quickstart_report import print_results, write_report
from mobilellm.config import ModelConfig
from mobilellm.data.documents import Document, paragraphs, python_documentation, text_files
from mobilellm.data.shards import ShardIndex, file_sha256, read_index, read_split, verify, write_shards
from mobilellm.installation import activation, install_command, missing_packages, program
from mobilellm.sampling import Sampling
from mobilellm.tokenizer import Tokenizer
from mobilellm.train.metrics import Record
from mobilellm.train.recipe import Recipe
from mobilellm.train.settings import BatchSettings, CheckpointSettings, OptimSettings, ScheduleSettings
from mobilellm.train.tables import DataChoice, LogChoice, ModelChoice

_STAGES = 6
_TEXT = (".txt", ".text")
_FEWEST_BYTES = 20_000
"""Of less text there may not be the 512 pieces of the smallest vocabulary."""
_PROMPT = "Return a list of"
_SAMPLING = Sampling(temperature=0.7, top_p=0.9, seed=0)


@dataclass
class Arguments:
    out: Path = Path("runs/quickstart")
    """Folder of the run."""
    text: tuple[Path, ...] = ()
    """Your own UTF-8 text files, or folders with .txt files, instead of Python's documentation."""
    steps: int = 500
    """Training steps."""
    prompt: str | None = None
    """What to complete at the end; "" begins with nothing. By default words of the text."""
    seed: int = 0
    """Seed of the weights, the order of the data and the completion."""
    fresh: bool = False
    """Delete what the run in --out made, and start over."""


def run(arguments: Arguments) -> None:
    arguments = replace(arguments, text=tuple(_searched(arguments.text)))
    out = arguments.out
    if absent := missing_packages("torch", "matplotlib"):
        raise ValueError(
            f"quickstart needs the {' and '.join(absent)} package{'s' * (len(absent) > 1)}; "
            f"install with: {install_command('train')}"
        )
    _recipe(arguments)  # refuses what cannot be trained with before anything is made
    identity = {
        "text": [_sha256(path) for path in arguments.text] or f"python {platform.python_version()}",
        "steps": arguments.steps,
        "seed": arguments.seed,
    }
    try:
        with claimed(out, identity, arguments.fresh):
            _run(arguments)
    except KeyboardInterrupt:
        print(f"\nStopped at once. {what_is_kept(out)}")
        sys.exit(130)
    except BrokenPipeError:
        say(f"nobody reads the output any more; stopped. {what_is_kept(out)}")
        sys.exit(128 + signal.SIGPIPE)  # as a shell has it


def _run(arguments: Arguments) -> None:
    started = time.perf_counter()
    out = arguments.out
    if (results := finished_results(out)) is not None:
        print(f"This run is complete ({out}); --fresh trains it again. Its results:\n")
        print_results(results)
    else:
        check_resumable(out)
        tokenizer, index = _prepare(arguments)
        config = _recipe(arguments).model.config(tokenizer.vocab_size)
        _check_prompt(arguments, config, tokenizer)
        _pretrain(arguments, config)
        print_results(_report(arguments, config, index, time.perf_counter() - started))
    _talk(arguments)
    _print_next(arguments)


def _prepare(arguments: Arguments) -> tuple[Tokenizer, ShardIndex]:
    """Stages 1 to 3: text, tokenizer, shards; each is skipped when it is there."""
    out = arguments.out
    if (out / "shards").is_dir():
        if not (out / "shards" / "tokenizer").is_dir():  # earlier versions kept it beside
            raise ValueError(f"{out / 'shards'}: holds no tokenizer; --fresh deletes the run and starts over")
        try:
            verify(out / "shards")
            tokenizer = Tokenizer.load(out / "shards" / "tokenizer")
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"{error} (--fresh does that, and starts over)") from None
    else:
        _stage(1, "reading text")
        documents = list(_documents(arguments))
        size = sum(len(document.text.encode()) for document in documents)
        if size < _FEWEST_BYTES:
            raise ValueError(
                f"quickstart: {size:,} bytes of text are too few to learn from; give more text, "
                f"{_FEWEST_BYTES:,} bytes at least"
            )
        print(f"      {len(documents):,} documents, {size / 1e6:.1f} MB")
        vocab_size = 2048 if size > 1_000_000 else 1024 if size > 100_000 else 512
        _stage(2, f"training a tokenizer of {vocab_size:,} tokens")
        tokenizer = Tokenizer.train((document.text for document in documents), vocab_size)
        _stage(3, "writing shards")
        of_python = f"the documentation of Python {platform.python_version()}"
        source = "your text" if arguments.text else of_python
        licence = "as your text" if arguments.text else "Python Software Foundation License 2"
        write_shards(out / "shards", documents, tokenizer, source, licence, overwrite=True)
    index = read_index(out / "shards")
    print(
        f"      {index.total('train', 'tokens'):,} tokens to train on, {index.total('held-out', 'tokens'):,} "
        f"held out, {index.total('train', 'bytes') / index.total('train', 'tokens'):.2f} bytes a token"
    )
    return tokenizer, index


def _check_prompt(arguments: Arguments, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Before the training, not after it."""
    length, context = len(tokenizer.encode(_prompt(arguments))), config.max_position_embeddings
    if length >= context:
        raise ValueError(f"--prompt has {length} tokens, and the model's context is {context}; shorten it")


def _documents(arguments: Arguments) -> Iterator[Document]:
    """The text, cut at blank lines into documents of a few pages."""
    documents = list(text_files(arguments.text) if arguments.text else python_documentation())
    total = sum(len(document.text) for document in documents)
    size = min(4000, max(500, total // 100))  # enough documents to hold some out, even of one short book
    for document in documents:
        yield from paragraphs(document, size)


def _recipe(arguments: Arguments) -> Recipe:
    """The run as `mobilellm train` would be told it."""
    return Recipe(
        steps=arguments.steps,
        seed=arguments.seed,
        model=ModelChoice(preset="tiny-ls"),
        data=DataChoice(train=(arguments.out / "shards",)),
        batch=BatchSettings(tokens_per_step=1024, sequence_length=256, micro_batch=4),
        optim=OptimSettings(name="muon", lr=2e-2),
        schedule=ScheduleSettings(warmup_steps=max(1, arguments.steps // 20)),
        checkpoint=CheckpointSettings(every=max(1, arguments.steps // 8)),
        evaluate_every=max(1, arguments.steps // 4),
        log=LogChoice(tensorboard=False),
    )


def _pretrain(arguments: Arguments, config: ModelConfig) -> None:
    """Stage 4. Ends the program when the run was stopped: it can go on."""
    from mobilellm.cli import run_folder, run_parts
    from mobilellm.report.progress import TrainingProgress, say_stopping
    from mobilellm.train.distributed import World
    from mobilellm.train.loop import train

    out, recipe, world = arguments.out, _recipe(arguments), World()
    text = run_parts.text(recipe)
    model = run_parts.model(recipe, config, text.tokenizer, world)
    with contextlib.ExitStack() as stack:
        watchers: list[Callable[[Record], None]] = []

        def on_start(first: int) -> None:
            card = run_parts.card(out.name, recipe, config, text, first, world)
            at = f", going on after step {first:,}" if first else ""
            _stage(
                4,
                f"pretraining {card['parameters'] / 1e6:.1f}M parameters: {config.num_layers} blocks of "
                f"width {config.hidden_size}, each run {config.repeats} times{at}",
            )
            bar = stack.enter_context(TrainingProgress(recipe.steps, first))
            watchers.extend((run_folder.FolderFiles(out, recipe, card), bar.update))

        def on_record(record: Record) -> None:
            for watcher in watchers:
                watcher(record)

        done = train(
            model,
            text.loader(world),
            recipe,
            out,
            text.evaluator(world),
            on_record,
            on_stop=say_stopping,
            on_start=on_start,
        ).steps
    run_parts.keep_model(out, model, recipe, text, world)
    if done == recipe.steps:
        return
    print(
        f"\nStopped after step {done} of {recipe.steps}. The model so far is usable:\n"
        f"  {_next_commands(arguments)[0]}\nThe same command goes on from there."
    )
    sys.exit(130)


def _report(arguments: Arguments, config: ModelConfig, index: ShardIndex, seconds: float) -> dict[str, Any]:
    """Stage 5."""
    from mobilellm.model.api import generate

    _stage(5, "writing loss.png and report.html")
    prompt = _prompt(arguments)
    said = generate(arguments.out, prompt, _SAMPLING, max_new_tokens=80)[0].text
    return write_report(
        arguments.out, config, _recipe(arguments), index, seconds, (prompt, said), _next_commands(arguments)
    )


def _talk(arguments: Arguments) -> None:
    """Stage 6: stream a completion from the saved model."""
    from mobilellm.model.api import load

    _stage(6, "it talks:")
    loaded = load(arguments.out)
    prompt = _prompt(arguments)
    print(f"\n{prompt}", end="", flush=True)
    for piece in loaded.stream(prompt, _SAMPLING, max_new_tokens=80):
        print(piece.text, end="", flush=True)
    print("\n")


def _prompt(arguments: Arguments) -> str:
    """For the user's own text, the first words of what was held out."""
    if arguments.prompt is not None:
        return arguments.prompt
    if not arguments.text or not (arguments.out / "shards").is_dir():
        return _PROMPT
    beside = arguments.out / "shards" / "tokenizer"
    tokenizer = Tokenizer.load(beside if beside.is_dir() else arguments.out / "model")
    held_out = read_split(arguments.out / "shards", "held-out", tokenizer)
    words = tokenizer.decode(held_out[:200].tolist()).split()[:4]
    # On a command line a leading dash would be a flag's. The end of the ids may be half a character.
    return " ".join(words)[:60].lstrip("-").rstrip("\ufffd")


def _print_next(arguments: Arguments) -> None:
    print(f"Report: {arguments.out / 'report.html'}\nGo on:\n  " + "\n  ".join(_next_commands(arguments)))
    if command := activation():
        print(f"({command} makes it just `mobilellm`.)")


def _next_commands(arguments: Arguments) -> list[str]:
    """To be pasted into a shell."""
    out, call, prompt = str(arguments.out), program(), _prompt(arguments)
    out = f"./{out}" if out.startswith("-") else out
    ahead = "-- " if prompt.startswith("-") else ""
    return [
        f"{call} generate {shlex.quote(out)} --temperature 0.7 {ahead}{shlex.quote(prompt)}",
        f"{call} info {shlex.quote(out)}",
        f"{call} convert {shlex.quote(out)} {shlex.quote(f'{out}-llama')} --to llama --unroll",
    ]


def _stage(stage: int, what: str) -> None:
    print(f"[{stage}/{_STAGES}] {what}", flush=True)


def _searched(paths: Sequence[Path]) -> Iterator[Path]:
    """The files, and in place of a folder the text files in it, in the order of names."""
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in _TEXT and file.is_file())
        if not found:
            raise FileNotFoundError(f"{path}: holds no text file ({', '.join(_TEXT)}); name files")
        yield from found


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such text file")
    return file_sha256(path)
