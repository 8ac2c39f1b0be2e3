"""Look at conversations as a model will be trained on them: their text, and which of it is learnt.

    mobilellm data show conversations.jsonl --model MODEL

Learnt is what the assistant says and the </s> after it: green on a terminal, between « and » in a pipe. Below
the examples stands how much there is, and what is left out and why.

`mobilellm data batch RUN` shows the batch at which a run was stopped.
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import tyro

from mobilellm.chat.visible import visible
from mobilellm.chat_template import DEFAULT, ChatTemplate, Conversation, read_template, stored_template
from mobilellm.cli.notices import say
from mobilellm.data.chat import Place, Skip, encode, read_talks, said
from mobilellm.sentencepiece_model import SPECIAL_PIECES
from mobilellm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text


@dataclass(frozen=True)
class Arguments:
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE...")]
    """Files of conversations: .json, .jsonl, .parquet, packed or not; or folders of them."""
    model: str | None = None
    """Model whose tokenizer and template they are for: a directory, a run, a Hub id."""
    tokenizer: Path | None = None
    """In place of --model: a tokenizer directory, tokenizer.json or tokenizer.model."""
    template: Path | None = None
    """A Jinja chat template; by default the model's own, or ours where it has none."""
    number: Annotated[int, tyro.conf.arg(aliases=["-n"])] = 3
    """How many examples."""
    skip: int = 0
    """Pass over so many usable conversations first."""
    sequence_length: int | None = None
    """Count longer ones as left out, as training with this batch.sequence_length does."""
    left_out: bool = False
    """List every record that is left out, with its place and the reason."""
    json: bool = False
    """Print one JSON object."""


class Part(NamedTuple):
    """A run of tokens that are all learnt or all not."""

    text: str
    trained: bool


@dataclass
class _Summary:
    lengths: list[int] = field(default_factory=list)
    trained: int = 0
    left_out: list[Skip] = field(default_factory=list)
    examples: list[tuple[Place, Conversation]] = field(default_factory=list)


def run(arguments: Arguments) -> None:
    if arguments.number < 0 or arguments.skip < 0:
        name = "number" if arguments.number < 0 else "skip"
        raise ValueError(f"data show: {name} = {getattr(arguments, name)} must be 0 or above")
    if not arguments.files:
        raise ValueError("data show: name at least one file of conversations")
    template = _template(arguments)
    summary = _read(arguments, template)
    if arguments.json:
        print(json.dumps(_described(arguments, template.tokenizer, summary)))
        return
    for place, conversation in summary.examples:
        _show(template.tokenizer, place, conversation)
    for line in _closing(arguments, summary):
        print(line)


def parts_of(tokenizer: Tokenizer, conversation: Conversation) -> list[Part]:
    """The text of a conversation as the model reads it, special tokens by their names."""
    pairs = zip(conversation.tokens, conversation.trained, strict=True)
    return [
        Part(spelt(tokenizer, (token for token, _ in group)), trained)
        for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1])
    ]


def spelt(tokenizer: Tokenizer, tokens: Iterable[int]) -> str:
    """Tokens as text, special ones by their names."""
    return b"".join(_bytes(tokenizer, token) for token in tokens).decode(errors="replace")


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    return SPECIAL_PIECES[token].encode() if token < len(SPECIAL_PIECES) else tokenizer.token_bytes(token)


def _template(arguments: Arguments) -> ChatTemplate:
    if (arguments.model is None) == (arguments.tokenizer is None):
        raise ValueError("data show: give --model, whose tokenizer and template are used, or --tokenizer")
    source = DEFAULT
    if arguments.model is not None:
        from mobilellm import hub

        directory = hub.resolve(arguments.model, say)
        tokenizer, source = Tokenizer.load(directory), stored_template(directory) or DEFAULT
    else:
        assert arguments.tokenizer is not None
        tokenizer = Tokenizer.load(arguments.tokenizer)
    if arguments.template is not None:
        source = read_template(arguments.template)
    return ChatTemplate(source, tokenizer)


def _read(arguments: Arguments, template: ChatTemplate) -> _Summary:
    most = sys.maxsize if arguments.sequence_length is None else arguments.sequence_length + 1
    summary = _Summary()
    for place, talk in read_talks(arguments.files):
        made = encode(place, talk, template, most)
        if isinstance(made, Skip):
            summary.left_out.append(made)
            continue
        if 0 <= len(summary.lengths) - arguments.skip < arguments.number:
            summary.examples.append((place, made))
        summary.lengths.append(len(made.tokens))
        summary.trained += sum(made.trained)
    return summary


def _show(tokenizer: Tokenizer, place: Place, conversation: Conversation) -> None:
    from rich.console import Console
    from rich.text import Text

    tokens, trained = len(conversation.tokens), sum(conversation.trained)
    head = f"{place.file}, {place.unit} {place.number}: {tokens:,} tokens, {trained:,} of them learnt"
    parts = parts_of(tokenizer, conversation)
    if not sys.stdout.isatty():
        print(head)
        print("".join(f"«{part.text}»" if part.trained else part.text for part in parts), end="\n\n")
        return
    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(head, style="bold"))
    console.print(Text.assemble(*_coloured(parts)), end="\n\n")


def _coloured(parts: list[Part]) -> Iterator[Text]:
    from rich.text import Text

    for part in parts:
        yield Text(visible(part.text), style="green" if part.trained else "")


def _closing(arguments: Arguments, summary: _Summary) -> list[str]:
    lengths, skips = summary.lengths, summary.left_out
    lines = [f"{len(lengths):,} of {len(lengths) + len(skips):,} records are conversations to learn from"]
    if lengths:
        share = summary.trained / sum(lengths)
        lines += [
            f"{sum(lengths):,} tokens, {summary.trained:,} of them learnt ({share:.0%})",
            f"tokens of one: {min(lengths):,} to {max(lengths):,}, median {statistics.median(lengths):,.0f}",
        ]
    if skips:
        more = "" if arguments.left_out else " (--left-out lists them)"
        lines.append(f"left out: {said(_counts(skips))}{more}")
    if arguments.left_out:
        lines += map(_in_a_line, skips)
    return lines


def _in_a_line(skip: Skip) -> str:
    place, words = skip.place, " ".join(skip.words.split())
    return f"{place.file}, {place.unit} {place.number}: {skip.reason}: {visible(words)}"


def _counts(skips: list[Skip]) -> dict[str, int]:
    return dict(Counter(skip.reason for skip in skips).most_common())


def _described(arguments: Arguments, tokenizer: Tokenizer, summary: _Summary) -> dict[str, Any]:
    described: dict[str, Any] = {
        "files": [str(file) for file in arguments.files],
        "conversations": len(summary.lengths),
        "tokens": sum(summary.lengths),
        "trained_tokens": summary.trained,
        "longest": max(summary.lengths, default=0),
        "left_out": _counts(summary.left_out),
        "examples": [
            {
                "file": place.file,
                place.unit: place.number,
                "tokens": made.tokens,
                "trained": made.trained,
                "parts": [part._asdict() for part in parts_of(tokenizer, made)],
            }
            for place, made in summary.examples
        ],
    }
    if arguments.left_out:
        described["left_out_records"] = [
            {
                "file": skip.place.file,
                skip.place.unit: skip.place.number,
                "reason": skip.reason,
                "words": skip.words,
            }
            for skip in summary.left_out
        ]
    return described
