"""One model in all the formats it was exported to: size, quality, speed and memory of each, in one table.

Takes the verified artefacts that lie in DIR. Perplexity and KL are those of their verify reports; speed and
memory are measured now, every artefact in its own runtime, in processes of its own, in turns.
Writes Markdown, JSON and a picture.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from mobilellm.cli.notices import say

if TYPE_CHECKING:
    from mobilellm.eval.tasks import LoadedTasks
    from mobilellm.export.found import Found
    from mobilellm.export.speed import Speed
    from mobilellm.report.artefacts import ArtefactRow


@dataclass(frozen=True)
class Arguments:
    folder: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="DIR")]
    """Folder with artefacts of one model, each beside its verify report."""
    out: Path | None = None
    """Folder of the report. Default: DIR/report."""
    data_dir: Path | None = None
    """Score the eight zero-shot tasks, too, from the data in this folder, where the runtime can."""
    limit: int | None = None
    """Documents of each task, the first ones; by default all."""
    rounds: int = 3
    """How often each is measured, in turns, every time in a process of its own; the median counts."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of the table."""


def run(arguments: Arguments) -> None:
    from mobilellm.cli.tables import print_notes, print_table
    from mobilellm.environment import environment
    from mobilellm.export.found import find
    from mobilellm.report.artefacts import HEADER, cells, numbers, write_report

    if arguments.rounds < 1:
        raise ValueError(f"rounds = {arguments.rounds} must be at least 1")
    if arguments.limit is not None and arguments.data_dir is None:
        raise ValueError(f"limit = {arguments.limit} is of the zero-shot tasks; add --data-dir")
    import matplotlib  # noqa: F401  # missing, it is better told now

    found = find(arguments.folder, say)
    tasks = _tasks(arguments)
    notes: list[str] = []
    speeds = _speeds(found, arguments.rounds, notes)
    rows = [_row(each, speeds.get(each.path), tasks, arguments, notes) for each in found]
    first = next((each for each in found if each.of_origin), found[0])
    notes += _notes(found, arguments)
    about: dict[str, Any] = {
        "source": first.report["source"],
        "source_sha256": first.origin,
        "environment": environment(("mobilellm", "torch", "transformers", "llama-cpp-python", "numpy")),
    }
    files = write_report(rows, notes, about, arguments.out or arguments.folder / "report")
    if arguments.json:
        print(json.dumps({**numbers(rows, notes, about), "files": list(map(str, files))}))
        return
    print_table(HEADER, [cells(row) for row in rows])
    print_notes([*notes, f"Report: {files[0]}"])


def _row(
    each: Found, speed: Speed | None, tasks: LoadedTasks | None, arguments: Arguments, notes: list[str]
) -> ArtefactRow:
    from mobilellm.report.artefacts import ArtefactRow

    report = each.report
    fidelity = next(iter(report["fidelity"].values()))
    return ArtefactRow(
        name=each.path.name,
        kind=each.kind.name,
        stored_as=_stored_as(report["options"]),
        quantized_by=report.get("quantized_by"),
        bytes=report["bytes"],
        bits_per_weight=report["bits_per_weight"],
        perplexity=fidelity["perplexity"],
        kl=each.kl,
        accuracy=None if tasks is None else _accuracy(each, tasks, arguments.limit, notes),
        tokens_per_second=speed and speed.tokens_per_second,
        first_token_seconds=speed and speed.first_token_seconds,
        peak_bytes=speed and speed.peak_bytes,
        runtime=next(iter(report["runtimes"].values())),
    )


def _speeds(found: Sequence[Found], rounds: int, notes: list[str]) -> dict[Path, Speed]:
    from mobilellm.export.speed import measure_in_turns
    from mobilellm.export.targets import target_of

    def failed(path: Path, error: Exception) -> None:
        notes.append(f"{path.name}: not measured: {error}")

    artefacts = {}
    for each in found:
        try:
            target = target_of(each.kind.name)
            opener = target.runtimes(each.path)[next(iter(each.report["runtimes"]))]
            artefacts[each.path] = opener, target.inventory(each.path).config.max_position_embeddings
        except (ValueError, ImportError) as error:
            failed(each.path, error)
    say(f"measuring {len(artefacts)} artefacts, {rounds} times in turns")
    return measure_in_turns(artefacts, rounds, failed)


def _tasks(arguments: Arguments) -> LoadedTasks | None:
    if arguments.data_dir is None:
        return None
    from mobilellm.eval.tasks import load_tasks
    from mobilellm.eval.zero_shot import check_limit

    check_limit(arguments.limit)
    return load_tasks((), arguments.data_dir)


def _accuracy(each: Found, tasks: LoadedTasks, limit: int | None, notes: list[str]) -> float | None:
    """Average of the eight tasks in the artefact's own runtime; None where it could not be had."""
    from mobilellm.eval.models import open_model
    from mobilellm.eval.zero_shot import score

    say(f"scoring {each.path.name} on the eight tasks")
    try:
        model = open_model(each.path, "transformers" if each.kind.name == "hf" else "auto", say=say)
        return float(score(model, tasks, limit).record.results["average"]["acc_norm"])
    except (ValueError, OSError, ImportError) as error:
        notes.append(f"{each.path.name}: not scored: {error}")
        return None


def _stored_as(options: dict[str, Any]) -> str:
    kinds = [str(options[name]) for name in ("type", "embedding_type") if options.get(name)]
    words = kinds[:1] if len(set(kinds)) == 1 else kinds
    return " + ".join(words or ["as the source"]) + (", unrolled" if options.get("unroll") else "")


def _notes(found: list[Found], arguments: Arguments) -> list[str]:
    texts = {each.report["text"]["sha256"]: each.report["text"] for each in found}
    described = "; ".join(f"{text['name']}, {text['tokens']} tokens" for text in texts.values())
    notes = [f"Perplexity and KL (from the source, nats a token) by the verify reports, on: {described}."]
    if of_origin := [each for each in found if each.of_origin]:
        fidelity = next(iter(of_origin[0].report["fidelity"].values()))
        notes[0] += f" The source itself has {fidelity['source_perplexity']:.4g} there."
    if others := [each.path.name for each in found if each.kl is None]:
        notes.append(
            "Compared with a quantised model only, so that KL from the source is not known: "
            f"{', '.join(others)}. mobilellm verify with --origin measures it."
        )
    notes.append(
        "Tokens/s: one at a time. First token: from the start of a process. Peak memory: of that process, "
        "libraries and the file's mapped pages included. All three are medians over "
        f"{arguments.rounds} processes, in turns. A directory for transformers runs in float32."
    )
    if len(texts) > 1:
        notes.insert(
            0, "The artefacts were compared on different texts: their perplexities say nothing together."
        )
    if arguments.data_dir is not None:
        many = f"the first {arguments.limit} documents of each" if arguments.limit else "all documents"
        notes.append(f"Eight tasks: zero-shot, average of acc_norm (acc where a task has none), {many}.")
    return notes
