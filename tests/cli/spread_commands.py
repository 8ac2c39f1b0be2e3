"""Commands of `mobilellm` in several processes, as torchrun would start them, one after the other in each."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path


def launch(size: int, folder: Path, commands: Sequence[Sequence[str]]) -> list[list[tuple[int, str]]]:
    """Of every process its exit codes and what it said to stderr, by rank; files go to `folder`."""
    (folder / "commands.json").write_text(json.dumps(list(zip(commands, _ports(len(commands)), strict=True))))
    common = {"WORLD_SIZE": f"{size}", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)],
            env=os.environ | common | {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(errors)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


def _ports(count: int) -> list[int]:
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
