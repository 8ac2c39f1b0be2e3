"""A folder of files that runs the model in the browser: no server of ours, nothing from another host.

MODEL is exported to ONNX and compared with its source, as `export` does, unless it is such an export already.
OUT then holds the page of `serve`, transformers.js and onnxruntime's WebAssembly. These two come from the npm
registry the first time, by their pinned hashes, and from this user's cache afterwards.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from mobilellm.cli.notices import say


@dataclass(frozen=True)
class Arguments:
    model: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="MODEL")]
    """Model directory, training run, Hub id (org/name), or a directory that `export --to onnx` wrote."""
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    """Folder to write; it appears whole or not at all."""
    type: str | None = None
    """How weights are stored: fp32, int8, or int4 (default)."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace OUT if it is there."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""


def run(arguments: Arguments) -> None:
    from mobilellm.cli.tables import print_notes, print_sheet
    from mobilellm.report.live_bar import LiveBar
    from mobilellm.serve.web.folder import write_folder

    with LiveBar(transient=True) as bar:
        folder = write_folder(
            arguments.model,
            arguments.out,
            arguments.type,
            arguments.overwrite,
            say,
            lambda what, done, total: bar.show(done, f"{what}, {done / 1e6:.1f} MB", total or None),
        )
    if arguments.json:
        values = dataclasses.asdict(folder) | {"path": str(folder.path)}
        print(json.dumps(values))
        return
    print_sheet(
        [("folder", f"{folder.path}, {folder.bytes:,} B"), ("model in it", f"{folder.model_bytes:,} B")]
    )
    python = shlex.quote(sys.executable)
    look = f"{python} -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(folder.path))} 8080"
    print_notes([*folder.notes, f"Look at it: {look}, then open http://127.0.0.1:8080"])
