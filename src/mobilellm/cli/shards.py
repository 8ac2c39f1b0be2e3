"""Token shards: what a folder holds, whether it is whole, and the ways in and out of it.

The layout of the reference's training code is one folder a node, 1/, 2/, … with a .jsonl file of lines
{"token_ids": […]}; amber-data-prep writes the same lines into train_0.jsonl, train_1.jsonl, ….
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

Folder = Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SHARDS")]


@dataclass(frozen=True)
class Info:
    """What a folder of shards holds: splits, files, tokens, documents, what was rejected."""

    shards: Folder
    """Folder of shards."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Verify:
    """Read every byte and compare each file with the sha256 that was taken while it was written."""

    shards: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="SHARDS [SHARDS ...]")]
    """Folders of shards."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Merge:
    """Make one folder of shards out of several, by hard links; the parts may be deleted afterwards.

    Nothing is tokenised or hashed again. Equal documents of different parts stay, on the same side of the
    split.
    """

    parts: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="PART [PART ...]")]
    """Folders of shards, or a folder with such folders in it, as a datatrove pipeline leaves it."""
    out: Path
    """Folder to write; it appears whole or not at all."""
    copy: bool = False
    """Copy the files: for another file system."""
    overwrite: bool = False
    """Replace the shards in OUT; the old ones go only when the new ones are complete."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Import:
    """Turn the reference's layout into shards. The tokens stay as they are; bad lines are counted and listed.

    The stream is put together as it was dealt out: the first line of every node, then the second, ….
    """

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder with node folders 1, 2, … in it, or with .jsonl files."""
    tokenizer: Path
    """Tokenizer the ids are of: a tokenizer.json, a tokenizer.model, or a directory with one."""
    out: Path
    """Folder to write; it appears whole or not at all."""
    held_out: float = 0.005
    """Share of the documents to hold out, by the hash of their text; 0 for none."""
    order: Literal["round-robin", "node-by-node"] = "round-robin"
    """node-by-node: all of node 1, then all of node 2, for data that was cut into blocks."""
    add_bos: bool = False
    """Put a BOS in front of every document without one: amber-data-prep writes none, masking needs it."""
    licence: str | None = None
    """Licence of the text, noted in the index; by default what DIR says."""
    overwrite: bool = False
    """Replace the shards in OUT; the old ones go only when the new ones are complete."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class Export:
    """Write shards in the reference's layout, for its pretrain.py: line n of the stream goes to node n mod N.

    The tokens after the last whole line go to DIR/remainder.jsonl, where the reference does not look.
    """

    shards: Folder
    """Folder of shards."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder to write; it appears whole or not at all."""
    nodes: int
    """Nodes of 8 GPUs that will train."""
    sequence_length: int = 2048
    """Predictions a line; it has one id more."""
    split: str = "train"
    """Split to write."""
    overwrite: bool = False
    """Replace an earlier export in DIR; the old one goes only when the new one is complete."""
    json: bool = False
    """Print one JSON object."""


Arguments = (
    Annotated[Info, tyro.conf.subcommand("info")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Import, tyro.conf.subcommand("import")]
    | Annotated[Export, tyro.conf.subcommand("export")]
)


def run(arguments: Info | Verify | Merge | Import | Export) -> None:
    match arguments:
        case Info():
            _info(arguments)
        case Verify():
            _verify(arguments)
        case Merge():
            _merge(arguments)
        case Import():
            _import(arguments)
        case Export():
            _export(arguments)


def _info(arguments: Info) -> None:
    from mobilellm.data.shard_index import read_index

    _print(arguments.shards, read_index(arguments.shards), arguments.json)


def _verify(arguments: Verify) -> None:
    from mobilellm.data.shards import read_index, verify

    if not arguments.shards:
        raise ValueError("shards verify: no folder is named; name at least one folder of shards")
    verified: list[dict[str, Any]] = []
    for folder in arguments.shards:
        verify(folder)
        shards = read_index(folder).shards
        files, tokens = len(shards), sum(shard.tokens for shard in shards)
        verified.append({"directory": str(folder), "files": files, "tokens": tokens})
        if not arguments.json:
            print(f"{folder}: {files} files, {tokens:,} tokens, every byte as it was written")
    if arguments.json:
        print(json.dumps({"verified": verified}))


def _merge(arguments: Merge) -> None:
    from mobilellm.data.shard_merge import merge_shards

    index = merge_shards(arguments.parts, arguments.out, arguments.copy, arguments.overwrite)
    _print(arguments.out, index, arguments.json)


def _import(arguments: Import) -> None:
    from mobilellm.data.reference_import import import_reference
    from mobilellm.tokenizer import Tokenizer

    index = import_reference(
        arguments.source,
        arguments.out,
        Tokenizer.load(arguments.tokenizer),
        held_out=arguments.held_out,
        order=arguments.order,
        add_bos=arguments.add_bos,
        licence=arguments.licence,
        overwrite=arguments.overwrite,
        progress=_every_ten_seconds(),
    )
    _print(arguments.out, index, arguments.json)
    if index.rejected:
        counts = ", ".join(f"{count:,} {reason}" for reason, count in index.rejected.items())
        _note(f"rejected lines: {counts}; they are listed in {arguments.out / 'rejected.jsonl'}")
    without = index.preparation["documents_without_bos"]
    if without:
        _note(f"{without:,} documents have no BOS, by which document masking goes; --add-bos gives them one")
    if arguments.held_out and not any(shard.split == "held-out" for shard in index.shards):
        _note(
            f"no document fell into the held-out share of {arguments.held_out}; --held-out takes a larger one"
        )


def _export(arguments: Export) -> None:
    from mobilellm.data.reference_layout import REMAINDER, export_reference

    done = export_reference(
        arguments.shards,
        arguments.out,
        arguments.nodes,
        arguments.sequence_length,
        arguments.split,
        arguments.overwrite,
    )
    if arguments.json:
        print(json.dumps({"directory": str(arguments.out), **asdict(done)}))
        return
    from mobilellm.cli.tables import print_sheet

    rows = [
        ("written", str(arguments.out)),
        ("nodes", f"{done.nodes:,}"),
        ("lines", f"{done.sequences:,} of {done.sequence_length + 1:,} ids"),
        ("tokens", f"{done.tokens:,} of split {done.split}"),
    ]
    if done.remainder:
        rows.append(("remainder", f"{done.remainder:,} tokens, fewer than a line, in {REMAINDER}"))
    print_sheet(rows)


def _print(folder: Path, index: Any, as_json: bool) -> None:
    """A folder of shards as a sheet, and a table of its splits."""
    names = list(dict.fromkeys(shard.split for shard in index.shards))
    fields = ("tokens", "documents", "bytes", "words")
    splits = {
        name: {"files": sum(shard.split == name for shard in index.shards)}
        | {field: index.total(name, field) for field in fields}
        for name in names
    }
    if as_json:
        values = {name: value for name, value in asdict(index).items() if name != "shards"}
        print(json.dumps({"directory": str(folder), **values, "splits": splits}))
        return
    from mobilellm.cli.tables import print_sheet, print_table

    rejected = ", ".join(f"{count:,} {reason}" for reason, count in index.rejected.items() if count)
    print_sheet(
        [
            ("shards", str(folder)),
            ("format", f"{index.format}, {8 * int(index.dtype[-1])} bits a token"),
            ("tokenizer", f"{index.vocab_size:,} pieces, {index.tokenizer[:16]}…"),
            ("source", index.source),
            ("licence", index.licence),
            ("rejected", rejected or "none"),
            *[(name.replace("_", " "), str(value)) for name, value in _plain(index.preparation)],
        ]
    )
    print()
    rows = [
        (name, *(f"{value:,}" for value in split.values()), f"{split['bytes'] / split['tokens']:.2f}")
        for name, split in splits.items()
    ]
    print_table(("split", "files", *fields, "bytes\na token"), rows)


def _plain(preparation: dict[str, Any]) -> list[tuple[str, Any]]:
    """The settings that were made and fit on a line; --json gives all."""
    return [
        (name, value)
        for name, value in preparation.items()
        if value not in (None, "") and not isinstance(value, dict | list)
    ]


def _every_ten_seconds() -> Callable[[int], None]:
    start = last = time.monotonic()

    def progress(tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= 10:
            last = now
            _note(f"{tokens:,} tokens, {tokens / (now - start):,.0f} a second")

    return progress


def _note(message: str) -> None:
    print(f"mobilellm: {message}", file=sys.stderr, flush=True)
