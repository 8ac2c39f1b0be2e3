"""The layout of the reference's training code: one folder a node, one JSON line a training sequence.

    DIR/1/train.jsonl   DIR/2/train.jsonl   …          {"token_ids": [1, 529, …]}

What it does with them (facebookresearch/MobileLLM, pretrain.py): global rank r opens the one .jsonl file of
DIR/(r // 8 + 1), GPU i of the 8 of a node takes the lines with index mod 8 = i, for ever, and skips a line it
cannot read. Lines are stacked into a batch, so all must be equally long, and shifted inside the model: 2,049
ids, as LLM360/amber-data-prep writes them, are 2,048 predictions. That cuts one stream of documents, each
closed by EOS and without BOS, into lines that do not overlap, drops the last, partial line, and deals line n
to file n mod N; its files are DIR/train_0.jsonl, train_1.jsonl, ….

Here the stream is put together again in the same way: the first line of every node in order of their numbers,
then the second of every node, and so on; a node that has no more lines is passed over.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from mobilellm.atomic import atomic_directory, atomic_write, made_of
from mobilellm.data.shard_index import ShardError
from mobilellm.data.shards import read_index, read_split

Order = Literal["round-robin", "node-by-node"]

FORMAT = "mobilellm-reference-layout-1"
MANIFEST = "mobilellm.json"
REMAINDER = "remainder.jsonl"
"""Beside the node folders, where the reference does not look: the tokens after the last whole line."""

GPUS_PER_NODE = 8  # written into the reference
_LONGEST_LINE = 2**26  # bytes; so that a file without line ends does not fill the memory
_LINES_AT_ONCE = 256
_EXCERPT = 320  # bytes of a bad line that are told


class Line(NamedTuple):
    """One line of a file: its ids, or why it cannot be used and how it begins."""

    file: str
    number: int  # from 1
    ids: NDArray[np.int64] | None
    reason: str = ""
    text: str = ""


@dataclass(frozen=True)
class Manifest:
    """mobilellm.json of a folder that `export` wrote: what is in it, and of what it was made."""

    format: str
    order: str
    nodes: int
    sequences: int
    sequence_length: int  # predictions a line; a line has one id more
    tokens: int  # all of them, the remainder included
    remainder: int
    split: str
    vocab_size: int
    tokenizer: str  # fingerprint
    source: str
    licence: str


class Layout(NamedTuple):
    """Files of each node, in order; the tail, if there is one; the manifest, if we wrote it."""

    nodes: list[list[Path]]
    remainder: Path | None
    manifest: Manifest | None


def export_reference(
    shards: Path,
    directory: Path,
    nodes: int,
    sequence_length: int = 2048,
    split: str = "train",
    overwrite: bool = False,
) -> Manifest:
    """Write a split of shards as `nodes` folders of lines of `sequence_length` + 1 ids, whole or not at all.

    Line n of the stream goes to node n mod `nodes`, so the nodes have equally many lines or differ by one.
    Documents are cut where a line ends. The tokens after the last whole line go to remainder.jsonl. Raises
    ValueError where a GPU of the reference would find no line to read: it would look for one for ever.
    """
    for name, value in (("nodes", nodes), ("sequence_length", sequence_length)):
        if value < 1:
            raise ValueError(f"{name} = {value} must be at least 1")
    index, stream = read_index(shards), read_split(shards, split)
    length = sequence_length + 1
    sequences, remainder = divmod(len(stream), length)
    if sequences < GPUS_PER_NODE * nodes:
        raise ValueError(
            f"{shards}: {len(stream)} tokens are {sequences} sequences of {length} ids, and {nodes} nodes of "
            f"{GPUS_PER_NODE} GPUs need at least {GPUS_PER_NODE * nodes}; take fewer nodes, shorter "
            "sequences or more text"
        )
    manifest = Manifest(
        FORMAT, "round-robin", nodes, sequences, sequence_length, len(stream), remainder, split,
        index.vocab_size, index.tokenizer, index.source, index.licence,
    )  # fmt: skip
    with atomic_directory(directory, overwrite, made_of(MANIFEST, REMAINDER, "[0-9]*/*.jsonl")) as temporary:
        with ExitStack() as stack:
            files = []
            for node in range(1, nodes + 1):
                (temporary / str(node)).mkdir()
                file = temporary / str(node) / f"{split}.jsonl"
                files.append(stack.enter_context(file.open("w", encoding="ascii")))
            for first in range(0, sequences, _LINES_AT_ONCE):
                last = min(first + _LINES_AT_ONCE, sequences)
                rows = stream[first * length : last * length].reshape(-1, length).tolist()
                for number, ids in enumerate(rows, first):
                    files[number % nodes].write(_line(ids))
        if remainder:
            (temporary / REMAINDER).write_text(_line(stream[sequences * length :].tolist()), encoding="ascii")
        with atomic_write(temporary / MANIFEST) as file:
            file.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    return manifest


def find_layout(directory: Path) -> Layout:
    """What there is to read in a folder. Raises FileNotFoundError, ValueError or ShardError.

    Node folders 1, 2, … or, without any, the .jsonl files of the folder itself, one a node, in the order of
    the numbers in their names.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder; name one with node folders 1, 2, … in it")
    remainder = directory / REMAINDER
    folders = {int(path.name): path for path in directory.iterdir() if _is_node(path)}
    if folders:
        if sorted(folders) != list(range(1, len(folders) + 1)):
            raise ValueError(
                f"{directory}: has node folders {_listed(sorted(folders))}, which are not 1, 2, … without "
                "a gap; data is missing, or the folders need other numbers"
            )
        nodes = [_files(folders[number]) for number in sorted(folders)]
        for number, files in enumerate(nodes, 1):
            if not files:
                raise ValueError(f"{folders[number]}: holds no .jsonl file; the data of this node is missing")
    else:
        nodes = [[file] for file in _files(directory) if file.name != REMAINDER]
        if not nodes:
            raise ValueError(f"{directory}: holds neither node folders 1, 2, … nor .jsonl files")
    return Layout(nodes, remainder if remainder.is_file() else None, _manifest(directory))


def read_sequences(directory: Path, layout: Layout, vocab_size: int, order: Order) -> Iterator[Line]:
    """Every line of a layout, the bad ones too, in the order of the stream; one line in memory at a time.

    Raises ShardError at the end if there are fewer or more lines than the manifest says.
    """
    nodes = [chain.from_iterable(_lines(file) for file in files) for files in layout.nodes]
    dealt = _round_robin(nodes) if order == "round-robin" else chain.from_iterable(nodes)
    count = 0
    for file, number, line in dealt:
        count += 1
        yield _sequence(str(file.relative_to(directory)), number, line, vocab_size)
    if layout.manifest is not None and count != layout.manifest.sequences:
        raise ShardError(
            f"{directory}: has {count} lines and its {MANIFEST} says {layout.manifest.sequences}; a file is "
            "cut short or changed; copy or export it again"
        )
    if layout.remainder is not None:
        for file, number, line in _lines(layout.remainder):
            yield _sequence(file.name, number, line, vocab_size)
    elif layout.manifest is not None and layout.manifest.remainder:
        raise ShardError(f"{directory}: {REMAINDER} is missing; copy or export it again")


def _line(ids: list[int]) -> str:
    return f'{{"token_ids": {ids}}}\n'  # how Python writes a list of ints is JSON, and three times as fast


def _round_robin(nodes: Sequence[Iterator[Any]]) -> Iterator[Any]:
    waiting = deque(nodes)
    while waiting:
        node = waiting.popleft()
        for item in node:
            yield item
            waiting.append(node)
            break


def _lines(file: Path) -> Iterator[tuple[Path, int, bytes]]:
    """(file, number from 1, line); of an endless line only so much that it is seen to be one."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(_LONGEST_LINE + 1):
            number += 1
            rest = line
            while len(rest) > _LONGEST_LINE and not rest.endswith(b"\n"):
                rest = stream.readline(_LONGEST_LINE + 1)
            yield file, number, line


def _sequence(file: str, number: int, line: bytes, vocab_size: int) -> Line:
    ids, reason = _token_ids(line)
    reason = reason or _fault(ids, vocab_size)
    if reason:
        return Line(file, number, None, reason, line[:_EXCERPT].decode(errors="replace").strip())
    return Line(file, number, np.array(ids, dtype=np.int64))


def _token_ids(line: bytes) -> tuple[Any, str]:
    """What the line has as token_ids, None if nothing, and why the line cannot be read at all, or ""."""
    if len(line) > _LONGEST_LINE:
        return None, "too long"
    if not line.strip():
        return None, "empty"
    try:
        values = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        return None, "not UTF-8"
    except (ValueError, RecursionError):
        return None, "not JSON"
    return values.get("token_ids") if isinstance(values, dict) else None, ""


def _fault(ids: Any, vocab_size: int) -> str:
    """Why these are no token ids, or ""."""
    if ids is None:
        return "no token_ids"
    if not isinstance(ids, list) or set(map(type, ids)) - {int}:  # bool is no int here, 1.0 neither
        return "not whole numbers"
    if not ids:
        return "empty"
    return "" if min(ids) >= 0 and max(ids) < vocab_size else "outside the vocabulary"


def _manifest(directory: Path) -> Manifest | None:
    file = directory / MANIFEST
    if not file.is_file():
        return None
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if values.get("format") != FORMAT:
            raise ValueError(f"format {values.get('format')!r} is not {FORMAT!r}")
        return Manifest(**values)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ShardError(f"{file}: not what export writes ({error}); export again, or remove it") from None


def _is_node(path: Path) -> bool:
    return (
        path.is_dir() and path.name.isascii() and path.name.isdecimal() and str(int(path.name)) == path.name
    )


def _files(directory: Path) -> list[Path]:
    return sorted((path for path in directory.glob("*.jsonl") if path.is_file()), key=_by_number)


def _by_number(path: Path) -> list[tuple[int, str]]:
    """train_10 after train_9."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"([0-9]+)", path.name)]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:8])) + (", …" if len(numbers) > 8 else "")
