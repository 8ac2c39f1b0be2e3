"""The artefacts of a folder, each with the report that says it was compared with its source."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mobilellm.export.targets import UNVERIFIED, Kind, kind_of
from mobilellm.export.verify import fingerprint, read_report


@dataclass(frozen=True)
class Found:
    path: Path
    kind: Kind
    report: dict[str, Any]
    """As verify.py wrote it."""

    @property
    def origin(self) -> str:
        """Fingerprint of the model it comes from, over whatever was quantised between."""
        origin: str = self.report.get("origin_sha256") or self.report["source_sha256"]
        return origin

    @property
    def of_origin(self) -> bool:
        """Whether it was compared with that model itself."""
        return bool(self.report["source_sha256"] == self.origin)

    @property
    def kl(self) -> float | None:
        """From that model, nats a token, in the first runtime; None where it was not measured."""
        fidelity = next(iter(self.report["fidelity"].values()))
        found: float | None = fidelity["kl"] if self.of_origin else fidelity.get("origin_kl")
        return found


def find(folder: Path, say: Callable[[str], None]) -> list[Found]:
    """The verified artefacts of one model, smallest first; `say` is told of those that are left out.

    A model and what was quantised from it count as one.

    Raises FileNotFoundError where there is none, ValueError for artefacts of more than one model.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    found = []
    for path in sorted(folder.iterdir()):
        try:
            kind = kind_of(path)
        except ValueError:
            continue
        if reason := _not_verified(path):
            say(f"{path}: left out, {reason}")
        else:
            report = read_report(path)
            assert report is not None
            found.append(Found(path, kind, report))
    if not found:
        raise FileNotFoundError(
            f"{folder}: holds no verified artefact; write some with mobilellm export MODEL {folder}/NAME.gguf"
        )
    origins = {each.origin: f"{each.path.name} of {each.report['source']}" for each in found}
    if len(origins) > 1:
        raise ValueError(
            f"{folder}: holds artefacts of several models: {'; '.join(origins.values())}; give each a folder"
        )
    return sorted(found, key=lambda each: int(each.report["bytes"]))


def _not_verified(path: Path) -> str:
    """Why an artefact is not in the table, or ""."""
    if path.name.endswith(UNVERIFIED):
        return "it is not verified"
    report = read_report(path)
    if report is None:
        return "it has no report; mobilellm verify makes one"
    if report["sha256"] != fingerprint(path):
        return "its report is of another artefact"
    return "" if report["passed"] else f"it failed {', '.join(report['failed'])}"
