"""The folder of a run: what is recognised as one, and the files that tell what it is.

recipe.toml   what was asked for
rejected.jsonl   what of conversations was not used and why, a record a line
run.json      what the metrics are read by: `run_parts.card` of the last start, and of every start when and at
              which step it was, on what, by which commit and versions
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write
from mobilellm.data.chat import Skip
from mobilellm.data.rejected import REJECTED
from mobilellm.train.checkpoint_files import checkpoints, is_remains, read_state
from mobilellm.train.metrics import read_metrics
from mobilellm.train.recipe import Recipe, to_toml

_OF_A_START = ("started", "step", "device", "world_size", "peak_flops", "commit", "versions")
"""What of a card belongs to one start of the run; its date is `started`."""

_ALWAYS = ("config", "parameters", "tokens_per_step", "started")
"""What is in every card, and by which one is told from another program's run.json."""


def check_folder(out: Path, resume: bool) -> None:
    """Refuse a folder that holds something else, and `resume` where nothing is to be resumed.

    A run is known by its run.json or by a checkpoint. One that was stopped before it had either has left
    nothing of worth: empty folders, and records of its first steps.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: is a file; choose another --out")
    if not (_read_card(out) or _has_checkpoint(out)) and (foreign := _foreign(out)):
        raise ValueError(
            f"{out}: holds something else than a training run of mobilellm ({foreign}); choose another --out"
        )
    if resume and not checkpoints(out / "checkpoints"):
        raise ValueError(f"{out}: has no checkpoint to go on from; leave --resume out to start afresh")


class FolderFiles:
    """Writes run.json and recipe.toml with the first record: not before is the folder sure to be ours."""

    def __init__(
        self, out: Path, recipe: Recipe, card: Mapping[str, Any], left_out: Sequence[Skip] = ()
    ) -> None:
        before = _read_card(out)
        starts = [*_starts(before), {name: card[name] for name in _OF_A_START}]
        card = {**card, "started": before.get("started", card["started"]), "starts": starts}
        del card["step"]
        self._out = out
        self._files: dict[str, str] = {  # run.json first: it is what a folder is known by
            "run.json": json.dumps(card, indent=2) + "\n",
            "recipe.toml": to_toml(recipe),
        }
        if left_out:
            self._files[REJECTED] = "".join(map(_rejected, left_out))

    def __call__(self, record: Mapping[str, Any]) -> None:
        for name, text in self._files.items():
            with atomic_write(self._out / name) as temporary:
                temporary.write_text(text, encoding="utf-8")
        self._files = {}


def _rejected(skip: Skip) -> str:
    file, unit, number = skip.place
    return json.dumps({"file": file, unit: number, "reason": skip.reason, "text": skip.words}) + "\n"


def _read_card(out: Path) -> dict[str, Any]:
    """What run.json says; {} where there is none or it is not ours."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        values = json.loads((out / "run.json").read_text("utf-8"))
        if isinstance(values, dict) and values.keys() >= set(_ALWAYS):
            return values
    return {}


def _starts(card: Mapping[str, Any]) -> list[Any]:
    """Of a run from before they were listed the first start, as far as it is known."""
    found = card.get("starts")
    if isinstance(found, list):
        return found
    return [{"step": 0, **{name: card[name] for name in _OF_A_START if name in card}}] if card else []


def _has_checkpoint(out: Path) -> bool:
    """Of ours, which say in state.json what they hold."""
    for checkpoint in checkpoints(out / "checkpoints"):
        with contextlib.suppress(ValueError):
            read_state(checkpoint)
            return True
    return False


def _foreign(out: Path) -> str:
    """The first thing that a run stopped at its very beginning does not leave, or ""."""
    for path in sorted(out.iterdir()) if out.is_dir() else ():
        if path.name == "checkpoints" and path.is_dir():
            if others := [each.name for each in path.iterdir() if not is_remains(each)]:
                return f"checkpoints/{min(others)}"
        elif path.name == "metrics.jsonl" and path.is_file():
            if path.stat().st_size and not _are_records(path):
                return path.name
        elif not (path.name == "tensorboard" and path.is_dir()) and ".tmp-" not in path.name:
            return path.name
    return ""


def _are_records(file: Path) -> bool:
    try:
        return bool(read_metrics(file))
    except ValueError:
        return False
