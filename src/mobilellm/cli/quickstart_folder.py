"""The folder of a quickstart: one process at a time, one run, nothing deleted that the run did not make."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write, foreign_file, hold
from mobilellm.model_directory import not_a_model_directory
from mobilellm.train.checkpoint_files import checkpoints, step_of
from mobilellm.train.metrics import Record, read_metrics

_FILES = (
    "loss.png", "metrics.jsonl", "recipe.toml", "report.html", "report.json", "run.json",
    "quickstart.json",  # the claim goes last
)  # fmt: skip
_FOLDERS = {  # and what the run puts there
    "checkpoints": ("step-*/*",),
    "model": None,  # of a model directory
    "shards": ("index.json", "*.bin", "tokenizer/*.json"),
    "tokenizer": ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
}  # fmt: skip
_REMAINS = re.compile(r"(.+)\.(tmp|old)-.+")  # of a process that was killed while it wrote


@contextlib.contextmanager
def claimed(out: Path, identity: dict[str, Any], fresh: bool) -> Iterator[None]:
    """Hold `out` for this process and make it the run `identity`, or refuse a folder that is something else.

    With `fresh` what the run made there is deleted first. A start that fails before there is anything to go
    on from leaves nothing behind. Raises ValueError, or NotADirectoryError for a file.
    """
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out}: is a file; name a folder with --out")
    made_here = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        with hold(out, f"{out}: another quickstart is running there; wait for it, or choose another --out"):
            _claim(out, identity, fresh)
            try:
                yield
            except Exception:
                if not _has_work(out):
                    _delete(out)
                raise
    finally:
        if made_here and not any(out.iterdir()):
            out.rmdir()


def finished_results(out: Path) -> dict[str, Any] | None:
    """What report.json says, if the run's report and model are all there and whole."""
    from mobilellm.model.api import load

    if not all((out / name).is_file() for name in ("report.json", "report.html", "loss.png")):
        return None
    try:
        results = _read_json(out / "report.json")
        for when in ("before", "after"):
            _ = f"{results[when]['perplexity']:f} {results[when]['bits_per_byte']:f}"
        loaded = load(out / "model", say=lambda message: None)
    except (ValueError, TypeError, KeyError, OSError):  # the report is made again, from the checkpoint
        return None
    return results if loaded.tokenizer is not None else None


def check_resumable(out: Path) -> None:
    """Raises ValueError for what would make a resumed run fail at its end."""
    if (step := last_checkpoint(out)) is not None:
        recorded(out, step)
    model = out / "model"
    if model.is_dir() and any(model.iterdir()) and (reason := not_a_model_directory(model)):
        raise ValueError(f"{model}: {reason}; move it away, then the same command goes on")


def recorded(out: Path, step: int) -> list[Record]:
    """The records up to `step`, which must be all there. Raises ValueError."""
    file = out / "metrics.jsonl"
    records = [record for record in read_metrics(file) if record["step"] <= step]
    missing = set(range(1, step + 1)) - {record["step"] for record in records if "loss" in record}
    if missing or not any(record["step"] == 0 and "eval" in record for record in records):
        raise ValueError(
            f"{file}: {len(missing) or 'the first evaluation'} of {step} steps are not recorded there, so no "
            "true report can be made; put the file back, or --fresh deletes the run and starts over"
        )
    return records


def last_checkpoint(out: Path) -> int | None:
    """The step a resumed run goes on from; None before the first checkpoint. Needs no torch."""
    found = checkpoints(out / "checkpoints")
    return step_of(found[-1]) if found else None


def what_is_kept(out: Path) -> str:
    """What a run that was stopped at once can go on from, and what is lost, in a sentence."""
    saved, done = last_checkpoint(out), 0
    with contextlib.suppress(ValueError, OSError):
        done = max((record["step"] for record in read_metrics(out / "metrics.jsonl")), default=0)
    if done > (saved or 0):
        lost = f"Step {done} is" if done == (saved or 0) + 1 else f"Steps {(saved or 0) + 1} to {done} are"
        if saved is None:
            return f"{lost} lost, for there was no checkpoint yet; the same command trains from the start."
        return f"{lost} lost: the last checkpoint, step {saved}, is where the same command goes on."
    if saved is not None:
        return f"All {saved} steps are kept; the same command goes on from there."
    prepared = (out / "shards" / "index.json").is_file()
    return f"The same command {'goes on with the training' if prepared else 'starts over'}."


def _claim(out: Path, identity: dict[str, Any], fresh: bool) -> None:
    file = out / "quickstart.json"
    foreign = [path.name for path in out.iterdir() if _made(path) is None]
    if not file.is_file() and foreign:
        raise ValueError(
            f"{out}: holds other things (such as {min(foreign)}) and is not a quickstart run; "
            "choose another --out"
        )
    if fresh or not _has_work(out):
        _delete(out)
    elif _read_json(file) != identity:
        raise ValueError(
            f"{out}: holds a run with other text, steps or seed; choose another --out, or --fresh to "
            "delete it and start over"
        )
    if not file.is_file():
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(identity, indent=2) + "\n", encoding="utf-8")


def _has_work(out: Path) -> bool:
    """Whether there is anything that took time to make: the text is tokenised, at least."""
    return any((out / name).exists() for name in ("shards", "checkpoints", "model"))


def _made(path: Path) -> str | None:
    """Which of the run's own files and folders this is, or is the unfinished remains of."""
    remains = _REMAINS.fullmatch(path.name)
    name = remains[1] if remains else path.name
    return name if name in (*_FILES, *_FOLDERS) else None


def _delete(out: Path) -> None:
    """Everything the run made, and nothing else. Raises ValueError before anything goes."""
    folders = [out / name for name in _FOLDERS if (out / name).is_dir() and not (out / name).is_symlink()]
    for folder in folders:
        known = _FOLDERS[folder.name]
        if known is not None and (foreign := foreign_file(folder, known)):
            raise ValueError(f"{folder}: holds {foreign}, which the run did not make; move it away first")
        if known is None and any(folder.iterdir()) and (reason := not_a_model_directory(folder)):
            raise ValueError(f"{folder}: {reason}; move it away first")
    busy = f"{out}: another process is training there; wait for it, or choose another --out"
    with hold(out / "checkpoints", busy) if out / "checkpoints" in folders else contextlib.nullcontext():
        for name in (*_FOLDERS, *_FILES):
            for path in [path for path in out.iterdir() if _made(path) == name]:
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:  # a link too, but not what it leads to
                    path.unlink()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: not JSON ({error}); --fresh deletes the run and starts over") from None
    if not isinstance(values, dict):
        raise ValueError(f"{file}: holds no JSON object; --fresh deletes the run and starts over")
    return values
