"""The eight zero-shot tasks of the published tables, as lm-eval registers them.

Their prompts, answers and metrics are lm-eval's. With a local folder only the source of the rows is replaced:
a YAML file that includes the registered one names ours, and the fields where the rows have others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from mobilellm.eval.task_files import TaskFile, read_task_file
from mobilellm.hub_connection import hub_or_cache

if TYPE_CHECKING:
    from lm_eval.api.task import Task

Scoring = Literal["per character", "one continuation", "against the unconditional answer"]


class ZeroShotTask(NamedTuple):
    name: str
    """lm-eval's."""
    column: str
    """The published tables'."""
    registered: str
    """Its file below lm_eval/tasks: to read all fourteen thousand there takes half a minute."""
    folders: tuple[str, ...]
    """Where its data lies below a local folder."""
    splits: tuple[str, ...]
    """The one lm-eval scores first."""
    paper: Scoring
    """How the `paper` column scores it; see mobilellm.eval.paper."""


_TEST, _VALIDATION = ("test", "validation"), ("validation",)
_LENGTH: Scoring = "per character"
_PRIOR: Scoring = "against the unconditional answer"
EIGHT = (
    ZeroShotTask("arc_easy", "ARC-e", "arc/arc_easy.yaml", ("arc_easy",), _TEST, _LENGTH),
    ZeroShotTask("arc_challenge", "ARC-c", "arc/arc_challenge.yaml", ("arc_challenge",), _TEST, _LENGTH),
    ZeroShotTask("boolq", "BoolQ", "super_glue/boolq/default.yaml", ("boolq",), _VALIDATION, _PRIOR),
    ZeroShotTask("piqa", "PIQA", "piqa/piqa.yaml", ("piqa",), _VALIDATION, _LENGTH),
    ZeroShotTask("social_iqa", "SIQA", "siqa/siqa.yaml", ("social_i_qa", "social_iqa"), _VALIDATION, _LENGTH),
    ZeroShotTask("hellaswag", "HellaSwag", "hellaswag/hellaswag.yaml", ("hellaswag",), _VALIDATION, _LENGTH),
    ZeroShotTask("openbookqa", "OBQA", "openbookqa/openbookqa.yaml", ("openbookqa",), _TEST, _PRIOR),
    ZeroShotTask(
        "winogrande",
        "WinoGrande",
        "winogrande/default.yaml",
        ("winogrande",),
        _VALIDATION,
        "one continuation",
    ),
)
"""In the order of the published tables."""
BY_NAME = {task.name: task for task in EIGHT}


class LoadedTasks(NamedTuple):
    """Tasks with their rows, ready to be scored by any number of models."""

    tasks: dict[str, Task]
    """lm-eval's objects by name, the eight first and in their order."""
    files: dict[str, TaskFile]
    """The local files they were read from; empty where lm-eval's own sources were."""

    @property
    def notes(self) -> list[str]:
        """What to say beside numbers made from these rows."""
        notes = [file.shape.note for file in self.files.values() if file.shape.note]
        for name, file in self.files.items():
            scored = BY_NAME[name].splits[0]
            if file.split != scored:
                notes.append(f"{BY_NAME[name].column}: the {file.split} split; lm-eval scores {scored}")
        return notes


def load_tasks(names: Sequence[str] = (), data_dir: str | Path | None = None) -> LoadedTasks:
    """The named tasks, all eight by default, with their data: lm-eval's sources, or a local folder's files.

    With a folder nothing is asked of the network and nothing kept on the disk; only the eight can be had so.
    Without one any task that lm-eval registers will do.
    Raises ValueError or FileNotFoundError for an unknown task, and for data that is absent or malformed.
    """
    wanted = list(dict.fromkeys(names)) or list(BY_NAME)
    others = [name for name in wanted if name not in BY_NAME]
    if others and data_dir is not None:
        raise ValueError(f"tasks: {', '.join(others)} is not one of {', '.join(BY_NAME)}")
    ours = [BY_NAME[name] for name in BY_NAME if name in wanted]
    connection = hub_or_cache() if data_dir is None else contextlib.nullcontext("")
    with quiet(), connection as unreachable, tempfile.TemporaryDirectory() as folder:
        files = {} if data_dir is None else {t.name: _local(t, Path(data_dir), Path(folder)) for t in ours}
        local = {name: Path(folder) / f"{name}.yaml" for name in files}
        tasks = {task.name: _load_file(task, local.get(task.name), unreachable) for task in ours}
        return LoadedTasks(tasks | _load_others(others, unreachable), files)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What lm-eval and datasets print goes nowhere; templates are compiled once, not for every document."""
    import datasets
    from lm_eval import utils

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], not datasets.are_progress_bars_disabled()
    compile_template = utils.env.from_string
    utils.env.from_string = lru_cache(maxsize=256)(compile_template)
    for logger in loggers:  # some have handlers of their own, which hold on to the terminal
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
            yield
    finally:
        utils.env.from_string = compile_template
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            datasets.enable_progress_bars()


def local_dataset(path: str, split: str, **metadata: object) -> Any:
    """Rows from a file, for lm-eval's `custom_dataset`, which hands in the task's metadata as well.

    Not datasets' own JSON reader: that one tells the Hub of every use and keeps a copy in the user's cache.
    """
    import datasets

    with open(path, encoding="utf-8") as lines:
        return datasets.DatasetDict({split: datasets.Dataset.from_list([json.loads(line) for line in lines])})


def _local(task: ZeroShotTask, source: Path, folder: Path) -> TaskFile:
    """Check a task's local file; write its rows and the YAML by which lm-eval reads them into `folder`."""
    import lm_eval.tasks
    import yaml

    file, rows = read_task_file(source, task.folders, task.splits, task.name)
    lines = folder / f"{task.name}.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    splits = {"training_split": None, "validation_split": None, "test_split": None}
    settings = {
        "include": str(Path(lm_eval.tasks.__file__).parent / task.registered),
        "dataset_kwargs": {"path": str(lines), "split": file.split},
        **splits,
        f"{file.split}_split": file.split,
        **file.shape.settings,
    }
    source_of_rows = f"custom_dataset: !function {__name__}.{local_dataset.__name__}\n"
    (folder / f"{task.name}.yaml").write_text(source_of_rows + yaml.safe_dump(settings), encoding="utf-8")
    return file


def _load_file(task: ZeroShotTask, local: Path | None, unreachable: str) -> Task:
    """One of the eight, from lm-eval's own file or from one that includes it."""
    import lm_eval.tasks

    file = local or Path(lm_eval.tasks.__file__).parent / task.registered
    manager = lm_eval.tasks.TaskManager(include_defaults=False)
    try:
        return manager.load([str(file)])["tasks"][task.name]
    except Exception as error:
        if local is not None:
            raise
        raise _no_data(task.name, unreachable or error) from error


def _load_others(names: Sequence[str], unreachable: str) -> dict[str, Task]:
    if not names:
        return {}
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    known = set(manager.all_subtasks)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"tasks: {', '.join(unknown)} is not one of {', '.join(BY_NAME)}, nor another task of lm-eval"
        )
    tasks = {}
    for name in names:
        try:
            tasks[name] = manager.load([name])["tasks"][name]
        except Exception as error:
            raise _no_data(name, unreachable or error) from error
    return tasks


def _no_data(task: str, error: Exception | str) -> ValueError:
    """Of the many ways in which datasets says that it has neither a network nor a copy."""
    reason = " ".join(str(error).split()) or type(error).__name__
    return ValueError(
        f"{task}: its data cannot be had from lm-eval's source ({reason}); without a network, name a folder "
        "that holds it with --data-dir"
    )
