"""Commands of `mobilellm` in several processes, as torchrun would start them, one after the other in each."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "train"))
from gloo_processes import run_spread


def launch(size: int, folder: Path, commands: Sequence[Sequence[str]]) -> list[list[tuple[int, str]]]:
    """Of every process its exit codes and what it said to stderr, by rank; files go to `folder`."""
    (folder / "commands.json").write_text(
        json.dumps(list(zip(commands, free_ports(len(commands)), strict=True)))
    )
    return run_spread(__file__, size, folder, {}, 300)


def free_ports(count: int) -> list[int]:
    """Of every command its own: where one has met, what it said there is found by the next."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _main(folder: Path) -> None:
    import torch

    from mobilellm.cli.main import _main as command

    torch.set_num_threads(1)
    seen = []
    for arguments, port in json.loads((folder / "commands.json").read_text()):
        os.environ["MASTER_PORT"] = f"{port}"
        with contextlib.redirect_stderr(io.StringIO()) as said:
            code = command(arguments)
        seen.append((code, said.getvalue()))
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
