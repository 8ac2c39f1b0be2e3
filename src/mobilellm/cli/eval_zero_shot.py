"""`mobilellm eval zero-shot`: the eight tasks, for one model or several beside each other."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilellm.cli.eval_model import ModelOptions, scored_model
from mobilellm.cli.eval_outputs import PRINTED, file_names, keep_record, output_file, print_records
from mobilellm.cli.notices import say

if TYPE_CHECKING:
    from mobilellm.eval.harness import Progress
    from mobilellm.eval.record import Record
    from mobilellm.eval.tasks import LoadedTasks
    from mobilellm.eval.zero_shot import ZeroShot as Scored

_METRICS = ("acc", "acc_norm", "paper")


@dataclass(frozen=True)
class ZeroShot:
    """Eight zero-shot tasks through lm-eval: ARC-e, ARC-c, BoolQ, PIQA, SIQA, HellaSwag, OBQA, WinoGrande.

    acc and acc_norm are lm-eval's; `paper` is a reconstruction of how the published tables were scored.
    Answers are kept as they come: after Ctrl-C the same command goes on.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL [MODEL ...]")]
    """Model directories, training runs, or Hub ids (org/name)."""
    tasks: str | None = None
    """Tasks by lm-eval's names, with commas between: arc_easy,piqa. By default the eight."""
    data_dir: Path | None = None
    """Folder with the tasks' data (arc_easy/test.jsonl, …); then nothing is fetched."""
    limit: int | None = None
    """Only so many documents of each task, the first ones: for a quick look, not for a table."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """Write a record: a file, or for several models a folder with one file each; - prints them in place of
    the table."""
    log_likelihoods: Annotated[Path | None, tyro.conf.arg(metavar="OUT.jsonl.gz")] = None
    """Write every answer's log-likelihood; for several models a folder."""
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


def run_zero_shot(arguments: ZeroShot) -> None:
    names = file_names("eval zero-shot", arguments.models, (arguments.json, arguments.log_likelihoods))
    if arguments.log_likelihoods == PRINTED:
        raise ValueError("log_likelihoods = - is packed and cannot be printed; name a file")
    tasks = [name for name in re.split(r"[,\s]+", arguments.tasks or "") if name]
    if arguments.tasks is not None and not tasks:
        raise ValueError("tasks = '' names none; leave --tasks out for the eight")
    from mobilellm.eval.tasks import BY_NAME, load_tasks
    from mobilellm.eval.zero_shot import check_limit, save_log_likelihoods

    check_limit(arguments.limit)
    if any(name not in BY_NAME for name in tasks) and arguments.data_dir is None:
        say("looking through all of lm-eval's tasks, which takes half a minute")
    elif arguments.data_dir is None:
        say("taking the tasks' data from lm-eval's sources on the Hub; --data-dir takes a folder instead")
    loaded = load_tasks(tasks, arguments.data_dir)
    records: list[Record] = []
    try:
        for source, name in zip(arguments.models, names, strict=True):
            scored = _score(arguments, source, loaded)
            records.append(scored.record)
            keep_record(scored.record, arguments.json, name, len(names))
            if arguments.log_likelihoods:
                path = output_file(arguments.log_likelihoods, name, ".jsonl.gz", len(names))
                save_log_likelihoods(scored, path)
    finally:  # what is finished is shown, whatever became of the rest
        if records and arguments.json != PRINTED:
            print_zero_shot(records)
    if arguments.json == PRINTED:
        print_records(records)


def print_zero_shot(records: Sequence[Record]) -> None:
    """The table of the eight and their average, other tasks' numbers below it, and what has to be known."""
    from mobilellm.cli.tables import print_notes, print_table
    from mobilellm.eval.tasks import EIGHT

    rows = [
        (f"{record.model.name}  {metric}", *(_cell(record, task.name, metric) for task in EIGHT),
         _cell(record, "average", metric))
        for record in records
        for metric in _METRICS
    ]  # fmt: skip
    print_table(("%", *(task.column for task in EIGHT), "average"), rows)
    others = [
        f"{record.model.name}  {name}: {_in_words(result)}"
        for record in records
        for name, result in record.results.items()
        if name != "average" and "paper" not in result
    ]
    print_notes([*others, *_notes(records)])


def _notes(records: Sequence[Record]) -> list[str]:
    """Each once; one that does not hold for all models says for which."""
    notes: dict[str, list[str]] = {}
    for record in records:
        for note in record.protocol["notes"]:
            notes.setdefault(note, []).append(record.model.name)
    return [
        note if len(names) == len(records) else f"{', '.join(names)}: {note}" for note, names in notes.items()
    ]


def _score(arguments: ZeroShot, source: str, loaded: LoadedTasks) -> Scored:
    from mobilellm.eval.zero_shot import score

    with scored_model(source, arguments.options, "tokens") as model:

        def progress(done: Progress) -> None:
            model.progress(done.tokens, done.all_tokens)

        return score(model.model, loaded, arguments.limit, progress=progress)


def _cell(record: Record, task: str, metric: str) -> str:
    result = record.results.get(task, {})
    if result.get(metric) is None:
        return "–"
    error = result.get(f"{metric}_stderr")
    return f"{100 * result[metric]:.1f}" + ("" if error is None else f" ± {100 * error:.1f}")


def _in_words(result: dict[str, Any]) -> str:
    """A task's own metrics, whatever they are."""
    numbers = {
        key: value
        for key, value in result.items()
        if isinstance(value, float) and "_stderr" not in key
    }  # fmt: skip
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers.items())
