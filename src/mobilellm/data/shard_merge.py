"""One folder of shards out of several, by hard links: nothing is tokenised, hashed or copied again."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm.atomic import atomic_directory, check_destination
from mobilellm.data.rejected import REJECTED
from mobilellm.data.shard_index import (
    SPLITS,
    Shard,
    ShardError,
    ShardIndex,
    make_index,
    not_shards,
    read_index,
    write_index,
)

PART = "part"
"""In an index's `preparation`: {"rank": r, "of": n}, if the folder is one of n parts that belong together."""


def merge_shards(
    parts: Sequence[Path], directory: Path, copy: bool = False, overwrite: bool = False
) -> ShardIndex:
    """Put the files of `parts` into `directory`, whole or not at all; the parts may be deleted afterwards.

    Parts of one run come in the order of their ranks and must all be there, other folders as they are given.
    A folder that is no folder of shards stands for those inside it. Sizes are checked, sha256 are taken over
    (`verify` compares). Equal documents of different parts stay, on the same side of the split. Raises
    ShardError where the parts do not fit together, ValueError where files cannot be linked (`copy` copies).
    """
    check_destination(directory, overwrite, not_shards)
    found = _in_order([(part, read_index(part, may_be_empty=True)) for part in find_parts(parts)])
    first = found[0][1]
    shards: list[Shard] = []
    with atomic_directory(directory, overwrite, not_shards) as temporary:
        for split in _splits([index for _, index in found]):
            number = 0
            for part, index in found:
                for shard in index.shards:
                    if shard.split == split:
                        name = f"{split}-{number:05d}.bin"
                        _place(part, shard, index.dtype, temporary / name, copy)
                        shards.append(replace(shard, file=name))
                        number += 1
        if not shards:
            raise ShardError(f"{directory}: none of the {len(found)} parts holds a document")
        with (temporary / REJECTED).open("wb") as rejected:
            for part, _ in found:
                if (part / REJECTED).is_file():
                    with (part / REJECTED).open("rb") as lines:
                        shutil.copyfileobj(lines, rejected)
        if (found[0][0] / "tokenizer").is_dir():
            shutil.copytree(found[0][0] / "tokenizer", temporary / "tokenizer")
        merged = make_index(
            first.vocab_size,
            first.tokenizer,
            "; ".join(dict.fromkeys(index.source for _, index in found if index.source)),
            "; ".join(dict.fromkeys(index.licence for _, index in found if index.licence)),
            _rejected([index for _, index in found]),
            tuple(shards),
            _preparation([index for _, index in found]),
        )
        write_index(temporary, merged)
    return merged


def is_merged(parts: Sequence[Path], directory: Path) -> bool:
    """Whether `directory` holds the files of `parts` already, and no others."""
    if not (directory / "index.json").is_file():
        return False
    indices = [read_index(part, may_be_empty=True) for part in find_parts(parts)]
    expected = sorted(shard.sha256 for index in indices for shard in index.shards)
    return expected == sorted(shard.sha256 for shard in read_index(directory).shards)


def find_parts(paths: Sequence[Path]) -> list[Path]:
    """The folders of shards among `paths` and, where a path is none, directly inside it, by name."""
    parts: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path}: no such folder")
        inside = [path] if (path / "index.json").is_file() else sorted(filter(_is_shards, path.iterdir()))
        if not inside:
            raise FileNotFoundError(f"{path}: neither a folder of shards nor one with such folders in it")
        parts += inside
    if not parts:
        raise ValueError("merge: no parts; name at least one folder of shards")
    named: set[Path] = set()
    for part in parts:
        if (real := part.resolve()) in named:
            raise ValueError(f"merge: {part}: named twice, so all it holds would come twice")
        named.add(real)
    return parts


def _is_shards(path: Path) -> bool:
    """Not what a killed run left behind: see mobilellm.atomic."""
    return (path / "index.json").is_file() and ".tmp-" not in path.name and ".old-" not in path.name


def _in_order(found: list[tuple[Path, ShardIndex]]) -> list[tuple[Path, ShardIndex]]:
    """Checked to fit together, in the order of their ranks where they have any."""
    name, first = found[0]
    for part, index in found[1:]:
        for field in ("tokenizer", "vocab_size", "dtype"):
            if getattr(index, field) != getattr(first, field):
                raise ShardError(
                    f"{part}: {field} is {getattr(index, field)} and that of {name} {getattr(first, field)}; "
                    "only shards of one tokenizer can be merged"
                )
    shares = {index.preparation["held_out"] for _, index in found if "held_out" in index.preparation}
    if len(shares) > 1:
        raise ShardError(
            f"{name}: the parts hold out different shares ({', '.join(map(str, sorted(shares)))}), so a text "
            "could stand on both sides; prepare them with the same held_out"
        )
    ranks = [index.preparation.get(PART) for _, index in found]
    if not any(ranks):
        return found
    parts_of = {rank["of"] for rank in ranks if rank}
    places = [rank["rank"] for rank in ranks if rank]
    if len(parts_of) > 1 or len(places) < len(ranks) or len(set(places)) < len(places):
        raise ShardError(
            f"{name}: parts of different runs; merge the parts of each run first, then what came out"
        )
    missing = sorted(set(range(parts_of.pop())) - set(places))
    if missing:
        raise ShardError(
            f"{name.parent}: {len(missing)} parts are missing, the first is {missing[0]}; run the pipeline "
            "again, it goes on with what is not complete"
        )
    return [pair for _, pair in sorted(zip(places, found, strict=True), key=lambda item: item[0])]


def _splits(indices: Sequence[ShardIndex]) -> list[str]:
    names = {shard.split for index in indices for shard in index.shards}
    return [split for split in SPLITS if split in names] + sorted(names - set(SPLITS))


def _place(part: Path, shard: Shard, dtype: str, target: Path, copy: bool) -> None:
    file = part / shard.file
    if not file.is_file() or file.stat().st_size != shard.tokens * np.dtype(dtype).itemsize:
        raise ShardError(f"{file}: missing or not {shard.tokens} tokens long; prepare this part again")
    if copy:
        shutil.copyfile(file, target)
        return
    try:
        os.link(file, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
            raise ValueError(
                f"{file}: cannot be linked from {target.parent.parent} ({error.strerror}); merge into a "
                "folder on the same file system, or pass --copy"
            ) from None
        raise


def _rejected(indices: Sequence[ShardIndex]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for index in indices:
        for reason, count in index.rejected.items():
            counts[reason] = counts.get(reason, 0) + count
    return counts


def _preparation(indices: Sequence[ShardIndex]) -> dict[str, Any]:
    """The settings the parts agree on, or those of each."""
    distinct: list[dict[str, Any]] = []
    for index in indices:
        settings = {name: value for name, value in index.preparation.items() if name != PART}
        if settings not in distinct:
            distinct.append(settings)
    if len(distinct) == 1:
        return distinct[0] | {"merged": len(indices)}
    shares = {name: value for each in distinct for name, value in each.items() if name == "held_out"}
    return shares | {"merged": len(indices), "preparations": distinct}
