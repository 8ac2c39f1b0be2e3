"""`mobilellm eval table`: the card's tables, rerun for the models that are named."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mobilellm.atomic import atomic_write, check_file_writable
from mobilellm.cli.eval_model import ModelOptions, Scored, scored_model
from mobilellm.cli.eval_outputs import PRINTED, check_output
from mobilellm.cli.main import one_line
from mobilellm.cli.notices import say
from mobilellm.cli.tables import print_notes, print_table
from mobilellm.eval.published import SIZES
from mobilellm.eval.record import Record
from mobilellm.eval.rerun import Wanted, measure, records, wanted
from mobilellm.eval.table import HEADER, METRICS, Entry, Measured, by_table, entries, rows, scores, table_json

if TYPE_CHECKING:
    from mobilellm.eval.harness import Progress
    from mobilellm.eval.tasks import LoadedTasks


@dataclass(frozen=True)
class Table:
    """The tables of the model card: published accuracy of all systems, ours of the models named, difference.

    Without a model it prints what is published, at once. A model is a Hub id, a directory, a name of the card
    ("OPT-125M"), or NAME=DIRECTORY for a directory of one's own that is to stand beside a published row.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[MODEL ...]")] = ()
    """Models to score, each on all eight tasks."""
    size: Literal["125m", "350m", "600m", "1b", "1.5b", "all"] | None = None
    """Which of the card's tables; by default all, or with models those they stand in."""
    data_dir: Path | None = None
    """Folder with the tasks' data, for scoring without network; by default lm-eval's own sources."""
    limit: int | None = None
    """Score only the first documents of each task: for a try, not for a table."""
    metric: Literal["paper", "acc_norm", "acc"] = "paper"
    """paper is the scoring the authors most likely used, rebuilt; acc_norm and acc are lm-eval's."""
    records: Path = Path("evaluations")
    """Folder of records: a model that has one there is not scored again."""
    out: Path | None = None
    """Folder for the tables as Markdown and PNG."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="OUT")] = None
    """File for the tables as JSON; - prints them so."""
    options: Annotated[ModelOptions, tyro.conf.arg(name="")] = field(default_factory=ModelOptions)


def run_table(
    arguments: Table,
    open_model: Callable[[str], AbstractContextManager[Any]] | None = None,
    evaluate: Callable[[Any], Record] | None = None,
) -> None:
    """Print the tables. Raises ValueError at the end if a model could not be scored; the others were.

    `open_model` and `evaluate` are what opens and scores a model, by default as `eval zero-shot` does.
    """
    if arguments.limit is not None and arguments.limit < 1:
        raise ValueError(f"eval table: limit = {arguments.limit} must be at least 1")
    if arguments.data_dir is not None and not arguments.data_dir.is_dir():
        raise FileNotFoundError(f"{arguments.data_dir}: no such folder; --data-dir names that of the tasks")
    check_output(arguments.json, check_file_writable)
    for path in (arguments.out, arguments.records if arguments.models else None):
        check_output(path)
    asked = [wanted(argument) for argument in arguments.models]
    open_model = open_model or functools.partial(scored_model, options=arguments.options, unit="tokens")
    measured, failed = _measure_all(arguments, asked, open_model, evaluate or _scoring(arguments))
    found = entries(_sizes(arguments.size, asked), measured)
    numbers = _numbers(arguments, found, failed)
    if arguments.json == PRINTED:
        print(json.dumps(numbers))
    else:
        _print(found, arguments.metric, bool(measured))
    if arguments.json not in (None, PRINTED):
        with atomic_write(arguments.json) as temporary:
            temporary.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    if arguments.out is not None:
        from mobilellm.report.evaluation_written import write_table

        files = write_table(arguments.out, found, arguments.metric, _texts(arguments, measured), numbers)
        if arguments.json != PRINTED:
            print_notes([f"Written: {files[0]}"])
    if failed:
        raise ValueError(
            f"eval table: {len(failed)} of {len(asked)} models could not be scored: {', '.join(failed)}"
        )


def _measure_all(
    arguments: Table,
    asked: Sequence[Wanted],
    open_model: Callable[[str], AbstractContextManager[Any]],
    evaluate: Callable[[Any], Record],
) -> tuple[list[Measured], dict[str, str]]:
    """What could be measured, and why what could not."""
    measured, failed = [], {}
    # A record does not say of which revision of a Hub repository it is; the model itself does.
    by_name = arguments.options.revision is None
    for each in asked:
        try:
            found = measure(each.model, arguments.records, _fits(arguments), open_model, evaluate, by_name)
            scores(found.record, arguments.metric)  # that it has the metric
        except Exception as error:  # whatever it is, the other models are worth their hours
            if os.environ.get("MOBILELLM_DEBUG"):
                raise
            failed[each.model] = one_line(error, "eval")
            say(f"{each.model}: {failed[each.model]}")
            continue
        if found.reused:
            say(f"{each.model}: from {found.path}, made {found.record.environment.get('date', 'once')}")
        else:
            say(f"{each.model}: record kept in {found.path}")
        measured.append(Measured(each.model, each.system, found.record))
    return measured, failed


def _sizes(size: str | None, asked: Sequence[Wanted]) -> tuple[str, ...]:
    if size is not None:
        return SIZES if size == "all" else (size,)
    named = {each.system.size for each in asked if each.system is not None}
    return tuple(each for each in SIZES if each in named) if asked else SIZES


def _print(found: Sequence[Entry], metric: str, compared: bool) -> None:
    from mobilellm.report.evaluation_written import table_notes

    for number, (title, held) in enumerate(by_table(found)):
        if number:
            print()
        print_table((title, *HEADER[1:]), rows(held, metric))
    notes = table_notes(metric)
    print_notes(notes if compared else notes[:1])


def _numbers(arguments: Table, found: Sequence[Entry], failed: dict[str, str]) -> dict[str, Any]:
    return {
        "metric": arguments.metric,
        "metric_meaning": METRICS[arguments.metric],
        "limit": arguments.limit,
        "systems": table_json(found, arguments.metric),
        "failed": failed,
    }


def _texts(arguments: Table, measured: Sequence[Measured]) -> list[tuple[str, Record]]:
    """Perplexity records of the same models, if the folder of records has any."""
    names = {each.record.model.fingerprint: each.name for each in measured}
    return [
        (names[record.model.fingerprint], record)
        for _, record in records(arguments.records, "perplexity")
        if record.model.fingerprint in names
    ]


def _fits(arguments: Table) -> Callable[[Record], bool]:
    """Whether a record was made as this command would make it, as far as the command says how."""
    options = arguments.options

    def fits(record: Record) -> bool:
        return (
            record.protocol.get("limit") == arguments.limit
            # The texts of local files are not always lm-eval's.
            and isinstance(record.protocol.get("data"), dict) == (arguments.data_dir is not None)
            and options.dtype in (None, record.model.weights_dtype)
            and options.backend in ("auto", record.model.backend)
        )

    return fits


def _scoring(arguments: Table) -> Callable[[Scored], Record]:
    """Zero-shot scoring on tasks that are loaded once, when the first model needs them."""

    @functools.cache
    def loaded() -> LoadedTasks:
        from mobilellm.eval.tasks import load_tasks

        return load_tasks((), arguments.data_dir)

    def evaluate(opened: Scored) -> Record:
        from mobilellm.eval.zero_shot import score

        def progress(done: Progress) -> None:
            opened.progress(done.tokens, done.all_tokens)

        return score(opened.model, loaded(), arguments.limit, progress=progress).record

    return evaluate
