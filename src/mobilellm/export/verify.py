"""Is an artefact what its source is? Looked at, run in its own runtime on real text, and told in a report.

The report lies beside the artefact, NAME.verify.json, and holds the artefact's SHA-256: it says of nothing
else anything. Only an artefact that passed every check has a name without ".unverified".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mobilellm import __version__
from mobilellm.atomic import atomic_write
from mobilellm.bytes_on_disk import bytes_on_disk
from mobilellm.environment import environment
from mobilellm.export.answer_checks import answer_checks, chat_checks, stop_check
from mobilellm.export.arithmetic import float_logits
from mobilellm.export.check import Check
from mobilellm.export.fidelity import Fidelity, fidelity
from mobilellm.export.inventory_checks import inventory_checks
from mobilellm.export.questions import Answers, Floats, Questions, ask
from mobilellm.export.source import Source
from mobilellm.export.targets import Options, Target, final_name
from mobilellm.export.text import SampleText, questions, sample_text
from mobilellm.quant.formats import FORMATS

FORMAT = "mobilellm verify report 1"
TOKENS = 512


@dataclass(frozen=True)
class Settings:
    """On what an artefact is compared, and what runs it."""

    text: Path | None = None
    """Text file to compare on; by default the documentation every Python carries."""
    tokens: int = TOKENS
    """Tokens of the text whose logits are compared."""
    runtime: str | None = None
    """What runs the artefact; by default all that can and are installed."""
    origin: str | None = None
    """What a quantised source was made of; by default where it says so, if that is still there."""


@dataclass(frozen=True)
class Report:
    """What was compared, on what, and how it came out."""

    artefact: str
    kind: str
    sha256: str
    bytes: int
    source: str
    source_sha256: str
    """Over the source's weights and tokenizer, wherever it lies."""
    origin_sha256: str
    """The same of what a quantised source was made of; of any other source its own."""
    quantized_by: str | None
    """How weights became whole numbers: rtn or gptq; None where they did not, or a source does not tell."""
    parameters: int
    """Of the source, a shared one counted once."""
    options: dict[str, Any]
    runtimes: dict[str, str]
    """What ran it, with version, by the names of `--runtime`."""
    text: dict[str, Any]
    checks: list[Check]
    fidelity: dict[str, Fidelity]
    """By runtime."""

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed for check in self.checks)

    @property
    def failed(self) -> list[str]:
        """Names of the checks that were not passed."""
        return [check.name for check in self.checks if not check.passed]

    @property
    def bits_per_weight(self) -> float:
        """The whole artefact, tokenizer and all, over the source's parameters."""
        return 8 * self.bytes / self.parameters

    def to_dict(self) -> dict[str, Any]:
        values = asdict(self)
        values["checks"] = [{**asdict(check), "passed": check.passed} for check in self.checks]
        values["fidelity"] = {name: each._asdict() for name, each in self.fidelity.items()}
        return {
            "format": FORMAT, "passed": self.passed, "failed": self.failed,
            "bits_per_weight": self.bits_per_weight, **values, "mobilellm": __version__,
            "environment": environment(("torch", "transformers", "numpy")),
        }  # fmt: skip


def verify(
    target: Target,
    path: Path,
    source: Source,
    options: Options | None = None,
    settings: Settings | None = None,
    say: Callable[[str], None] = lambda line: None,
    origin: Source | None = None,
) -> Report:
    """Compare an artefact with its source. Without options they are read from the artefact.

    How far it is from `origin`, of which a quantised source was made, is measured as well, and no check.

    What is wrong with the artefact is a failed check; raises ValueError and FileNotFoundError for mistakes in
    the settings, ImportError for a runtime that is not installed.
    """
    settings = settings or Settings()
    text = sample_text(settings.text)
    context = source.config.max_position_embeddings
    asked = questions(text, source.tokenizer, context, settings.tokens, source.chat_template)
    seen = _Seen(target, path, source, settings, text)
    try:
        found = target.inventory(path)
        chosen = target.complete(options or _stated(seen) or target.options_of(path, source), source)
    except (ValueError, TypeError, OSError, KeyError) as error:
        return seen.report([_failed("file", error)], options)
    expected = target.expected(source, chosen)
    checks = [Check("file", 0, 0, "faults", "reads whole"), *inventory_checks(found, expected)]
    checks += _report_check(seen)
    checks += target.checks(path, source, chosen)
    answers, failures = _answers(target, path, settings.runtime, asked, say)
    checks += failures
    if not answers:
        return seen.report(checks, chosen)
    say("comparing with the reference arithmetic")
    model = source.model()
    of_source = [float_logits(model, window) for window in asked.windows]
    of_origin: list[Floats] = []
    if origin is not None:
        model = origin.model()
        of_origin = [float_logits(model, window) for window in asked.windows]
    del model
    reference = target.reference(source, chosen)
    of_reference = [reference(window) for window in asked.windows]
    measured: dict[str, Fidelity] = {}
    for name, given in answers.items():
        if [each.shape for each in given.logits] != [each.shape for each in of_source]:
            wrong = ValueError(f"logits have shape {given.logits[0].shape}, expected {of_source[0].shape}")
            made = [_failed("runtime", wrong)]
        else:
            measured[name] = fidelity(given, asked, of_source, of_reference, of_origin)
            made = answer_checks(given, asked, source.tokenizer, reference, of_reference, measured[name])
            made.append(stop_check(found, expected, given, asked))
            made += chat_checks(given, asked, source.tokenizer.vocab_size, reference, of_reference)
        checks += [_in(check, name, answers) for check in made]
    return seen.report(checks, chosen, {name: given.runtime for name, given in answers.items()}, measured)


def _answers(
    target: Target, path: Path, only: str | None, asked: Questions, say: Callable[[str], None]
) -> tuple[dict[str, Answers], list[Check]]:
    """Of all runtimes that are installed, or of `only` one, and a failed check for each that broke off."""
    openers = target.runtimes(path)
    if only is not None and only not in openers:
        raise ValueError(f"runtime = {only} cannot run this artefact; choose one of {', '.join(openers)}")
    answers, failures = {}, []
    for name, opener in openers.items():
        if only not in (None, name):
            continue
        try:
            with opener(path) as runtime:
                say(f"running {path.name} on {sum(map(len, asked.windows))} tokens in {runtime.name}")
                answers[name] = ask(runtime, asked)
        except ImportError:
            if name in (only, next(iter(openers))):
                raise
        except (ValueError, OSError, RuntimeError) as error:
            failures.append(_failed("runtime", error))
            if name != next(iter(openers)):
                failures[-1] = replace(failures[-1], name=f"runtime in {name}")
    return answers, failures


def _in(check: Check, runtime: str, answers: Mapping[str, Answers]) -> Check:
    """Checks of a second runtime say so in their names."""
    return check if runtime == next(iter(answers)) else replace(check, name=f"{check.name} in {runtime}")


def report_path(artefact: Path) -> Path:
    return artefact.with_name(artefact.name + ".verify.json")


def write_report(report: Report, artefact: Path) -> Path:
    """Beside the artefact, whole or not at all."""
    path = report_path(artefact)
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(report.to_dict(), indent=2) + "\n", encoding="utf-8")
    return path


def read_report(artefact: Path) -> dict[str, Any] | None:
    """The report beside an artefact, whatever it is of; None without one. Raises ValueError for no report."""
    path = report_path(artefact)
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise ValueError(f"{path}: is no verify report; remove it and verify again")
    return values


def fingerprint(path: Path) -> str:
    """SHA-256 of a file; of a directory, over the names and SHA-256 of its files in their order."""
    if path.is_file():
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    whole = hashlib.sha256()
    for file in sorted(item for item in path.rglob("*") if item.is_file()):
        whole.update(f"{file.relative_to(path).as_posix()}\0{fingerprint(file)}\n".encode())
    return whole.hexdigest()


class _Seen:
    """What is known of an artefact before it is compared."""

    def __init__(
        self, target: Target, path: Path, source: Source, settings: Settings, text: SampleText
    ) -> None:
        self._target, self.path, self._source, self._text = target, path, source, text
        self.sha256 = fingerprint(path)
        self._tokens = settings.tokens

    def report(
        self,
        checks: list[Check],
        options: Options | None,
        runtimes: dict[str, str] | None = None,
        measured: dict[str, Fidelity] | None = None,
    ) -> Report:
        origin = self._source.origin
        return Report(
            artefact=final_name(self.path).name,
            kind=self._target.kind.name,
            sha256=self.sha256,
            bytes=bytes_on_disk(self.path),
            source=self._source.name,
            source_sha256=self._source.fingerprint,
            origin_sha256=origin.sha256 if origin else self._source.fingerprint,
            quantized_by=_method(self._source, options),
            parameters=sum(tensor.numel() for tensor in self._source.tensors.values()),
            options=asdict(options) if options else {},
            runtimes=runtimes or {},
            text={"name": self._text.name, "sha256": self._text.sha256, "tokens": self._tokens},
            checks=checks,
            fidelity=measured or {},
        )


def _method(source: Source, options: Options | None) -> str | None:
    """Of a quantised source its own; an export rounds to the nearest where the type asks for it."""
    if source.quantized is not None:
        return source.origin.method if source.origin else None
    rounds = options is not None and options.type is not None and options.type.lower() in FORMATS
    return "rtn" if rounds else None


def _stated(seen: _Seen) -> Options | None:
    """The options in the report beside the artefact, if it is of this very artefact."""
    there = read_report(seen.path)
    if there is None or there["sha256"] != seen.sha256 or not there["options"]:
        return None
    return Options(**there["options"])


def _report_check(seen: _Seen) -> list[Check]:
    """A report that lies there already must be of this artefact."""
    there: Mapping[str, Any] | None = read_report(seen.path)
    if there is None:
        return []
    same = there["sha256"] == seen.sha256
    detail = "is of this artefact" if same else f"{report_path(seen.path).name} is of another artefact"
    return [Check("report", int(not same), 0, "faults", detail)]


def _failed(name: str, error: Exception) -> Check:
    return Check(name, None, 0, "faults", " ".join(str(error).split()))
