"""A folder that any server of static files serves: the page, the model, and what runs it in the browser.

index.html, …                     the page of `mobilellm serve`, with a backend.js of its own
model_worker.js, …                the model behind it, in a worker
transformers.min.js, ort-wasm-…   from the npm registry, see packages.py
model/                            an ONNX export, and card.json: its name and what is known of it
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from mobilellm.artefacts.onnx_engine import GENAI_CONFIG
from mobilellm.artefacts.opening import open_artefact
from mobilellm.atomic import atomic_directory, check_destination, made_of
from mobilellm.bytes_on_disk import bytes_on_disk
from mobilellm.export.export import export
from mobilellm.export.targets import KINDS, Options
from mobilellm.serve.facts import facts
from mobilellm.serve.web.packages import ONNXRUNTIME, TRANSFORMERS, Progress, files_of

PACKAGES = (TRANSFORMERS, ONNXRUNTIME)
_CARD = "model/card.json"
_SCRIPTS = "script-src 'self'"
_WITH_WEBASSEMBLY = f"{_SCRIPTS} 'wasm-unsafe-eval'"
_LICENCES = "LICENSES.txt"


@dataclass(frozen=True)
class Folder:
    path: Path
    bytes: int
    model_bytes: int
    notes: list[str]


def write_folder(
    model: str | Path,
    out: Path,
    kind: str | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
    progress: Progress = lambda what, done, total: None,
) -> Folder:
    """Write a model as such a folder; it appears whole or not at all.

    `model` is an ONNX directory that `export` wrote, or what can be exported to one of type `kind`, which is
    then compared with its source as `export` does. Raises ValueError where that fails, and as `files_of`.
    """
    check_destination(out, overwrite, _objection())
    libraries = [files_of(package, progress) for package in PACKAGES]
    if (Path(model) / GENAI_CONFIG).is_file():
        if kind is not None:
            raise ValueError(
                f"type = {kind}: {model} is an ONNX export already, which keeps its own; leave it out"
            )
        return _written(Path(model), Path(model).resolve().name, out, libraries, overwrite, [])
    out.resolve().parent.mkdir(parents=True, exist_ok=True)
    beside = f"{out.name}.tmp-{os.getpid()}-"  # by which atomic_directory clears what a killed process left
    with tempfile.TemporaryDirectory(prefix=beside, dir=out.resolve().parent) as temporary:
        exported = export(model, Path(temporary) / "onnx", KINDS["onnx"], Options(type=kind), say=say)
        assert exported.report is not None
        if not exported.report.passed:
            raise ValueError(
                f"{model}: its ONNX export failed {', '.join(exported.report.failed)}; "
                "mobilellm export MODEL OUT --to onnx shows the figures"
            )
        name = Path(model).resolve().name if Path(model).exists() else str(model).rpartition("/")[2]
        return _written(exported.path, name, out, libraries, overwrite, exported.notes)


def _written(
    onnx: Path, name: str, out: Path, libraries: Iterable[dict[str, bytes]], overwrite: bool, notes: list[str]
) -> Folder:
    card = _card(onnx, name)
    with atomic_directory(out, overwrite, _objection()) as folder:
        for source in (*_page_files(), *_own_files()):
            (folder / source.name).write_bytes(source.read_bytes())
        index = (folder / "index.html").read_text(encoding="utf-8")
        assert index.count(_SCRIPTS) == 1
        (folder / "index.html").write_text(index.replace(_SCRIPTS, _WITH_WEBASSEMBLY), encoding="utf-8")
        for library in libraries:
            for file, content in library.items():
                (folder / file).write_bytes(content)
        (folder / _LICENCES).write_text(_licences(), encoding="utf-8")
        shutil.copytree(onnx, folder / "model", ignore=shutil.ignore_patterns(GENAI_CONFIG))
        (folder / _CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
        return Folder(out, bytes_on_disk(folder), bytes_on_disk(folder / "model"), notes)


def _card(onnx: Path, name: str) -> dict[str, object]:
    known = facts(open_artefact(onnx))
    config = json.loads((onnx / "config.json").read_text(encoding="utf-8"))
    dtype = config["transformers.js_config"]["dtype"]
    kept = {key: value for key, value in known.items() if value is not None}
    return {"name": name, "dtype": dtype, "facts": {**kept, "engine": "onnxruntime, in this browser"}}


def _page_files() -> list[Traversable]:
    """Those of the page that `serve` shows, but for the module that talks to it."""
    page = files("mobilellm.serve") / "page"
    return [
        file
        for file in page.iterdir()
        if file.is_file() and file.name not in {own.name for own in _own_files()}
    ]


def _own_files() -> list[Traversable]:
    return [file for file in (files("mobilellm.serve.web") / "page").iterdir() if file.is_file()]


def _objection() -> Callable[[Path], str]:
    """To replacing a folder that is no older version of this."""
    names = [file.name for file in (*_page_files(), *_own_files())]
    names += [name for package in PACKAGES for name in package.files.values()]
    return made_of(_CARD, *names, _LICENCES, "model/*")


def _licences() -> str:
    lines = ["This folder holds files of others:", ""]
    for package in PACKAGES:
        lines += [
            f"{package.name} {package.version}, {package.licence}: {', '.join(package.files.values())}",
            f"  https://www.npmjs.com/package/{package.name}/v/{package.version}  {package.integrity}",
        ]
    return "\n".join([*lines, "", "The page and the worker are part of mobilellm, Apache-2.0.", ""])
