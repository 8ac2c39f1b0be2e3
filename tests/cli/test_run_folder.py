"""What is taken for the folder of a run, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mobilellm.cli.run_folder import check_folder
from mobilellm.train.checkpoint_files import RunState, write_state

CARD = {"config": {}, "parameters": 1, "tokens_per_step": 8, "started": "2026-11-20T10:00:00"}
RECORD = '{"step": 0, "eval": {"loss": 3.0}}\n'


def put(folder: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        path = folder / name
        if name.endswith("/"):
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
    return folder


def a_checkpoint(folder: Path) -> Path:
    path = folder / "checkpoints" / "step-00000005"
    path.mkdir(parents=True)
    write_state(path, RunState(5, {}, {}), {"file": "0"})
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"run.json": json.dumps(CARD)},
        {"run.json": json.dumps(CARD), "notes.txt": "mine", "report/": "", "checkpoints/other/": ""},
        {"checkpoints/": "", "tensorboard/": "", "metrics.jsonl": ""},
        {"checkpoints/step-00000005.tmp/": "", "checkpoints/step-3.deleted/": ""},
        {"metrics.jsonl": RECORD + RECORD[:9], "run.json.tmp-7-ab": "{"},
    ],
    ids=lambda files: ",".join(files) or "empty",
)
def test_ours(tmp_path: Path, files: dict[str, str]) -> None:
    """A run, also one that was killed before it had anything, with whatever else a person keeps there."""
    check_folder(put(tmp_path, files), resume=False)
    with pytest.raises(ValueError, match="has no checkpoint to go on from; leave --resume out"):
        check_folder(tmp_path, resume=True)


def test_ours_by_a_checkpoint(tmp_path: Path) -> None:
    """`train.loop.train` alone writes no run.json."""
    check_folder(put(a_checkpoint(tmp_path), {"notes.txt": "mine"}), resume=True)


@pytest.mark.parametrize(
    ("files", "named"),
    [
        ({"thesis.txt": ""}, "thesis.txt"),
        ({"checkpoints/last.ckpt": "", "metrics.jsonl": ""}, "checkpoints/last.ckpt"),
        ({"checkpoints/step-00000005/model.pt": ""}, "checkpoints/step-00000005"),
        ({"checkpoints/step-00000005/state.json": '{"step": 5}'}, "checkpoints/step-00000005"),
        ({"checkpoints": "a file"}, "checkpoints"),
        ({"checkpoints/": "", "shards/": ""}, "shards"),
        ({"run.json": "{}"}, "run.json"),
        ({"run.json": json.dumps({"config": {}, "parameters": 3})}, "run.json"),
        ({"run.json": "[" * 100_000}, "run.json"),
        ({"recipe.toml": "steps = 3"}, "recipe.toml"),
        ({"metrics.jsonl": '{"epoch": 1}\n'}, "metrics.jsonl"),
        ({"metrics.jsonl": "not\n" + RECORD}, "metrics.jsonl"),
    ],
    ids=str,
)
def test_foreign(tmp_path: Path, files: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_folder(put(tmp_path, files), resume=False)
    words = f"holds something else than a training run of mobilellm ({named}); choose another --out"
    assert str(caught.value) == f"{tmp_path}: {words}"


def test_no_folder(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    with pytest.raises(NotADirectoryError, match="run: is a file; choose another --out"):
        check_folder(tmp_path / "run", resume=False)
    check_folder(tmp_path / "absent", resume=False)
