"""Work that survives a crash at any moment: a folder beside the final one and a journal of what is safe.

Files in the folder only ever grow. The journal, replaced as a whole, says how long each was when everything
up to one place of the input was on the disk; going on cuts them back to that length.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mobilellm.atomic import atomic_write, hold
from mobilellm.data.shard_index import ShardError


class Workplace:
    """The folder OUT.partial, locked while it is open. `state` is what the journal said, {} at a new start.

    `command` are the settings that must be the same to go on. Raises ValueError with one line if the folder
    belongs to another command or another process has it; `fresh` empties it first.
    """

    def __init__(self, out: Path, command: Mapping[str, Any], fresh: bool = False) -> None:
        self.folder = out.with_name(f"{out.name}.partial")
        self.state: dict[str, Any] = {}
        self.folder.mkdir(parents=True, exist_ok=True)
        self._held = contextlib.ExitStack()
        self._held.enter_context(hold(self.folder, f"{self.folder}: another process is preparing into it"))
        try:
            if fresh:
                self._clear()
            self._claim(command)
        except BaseException:
            self.close()
            raise

    def save(self, state: Mapping[str, Any]) -> None:
        """Replace the journal; everything it speaks of must be on the disk already."""
        with atomic_write(self.folder / "journal.json") as temporary:
            temporary.write_text(json.dumps(state), encoding="utf-8")

    def remove(self) -> None:
        """Delete the folder: the work is done, or came to nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.close()

    def close(self) -> None:
        self._held.close()

    def _claim(self, command: Mapping[str, Any]) -> None:
        file = self.folder / "command.json"
        if not file.is_file():
            others = [path.name for path in self.folder.iterdir() if ".tmp-" not in path.name]
            if others:
                raise ValueError(
                    f"{self.folder}: holds {others[0]}, which is no unfinished preparation; move it away"
                )
            with atomic_write(file) as temporary:
                temporary.write_text(json.dumps(command, indent=2) + "\n", encoding="utf-8")
            return
        before = _read(file)
        if before != command:
            changed = sorted(
                key.replace("_", " ") for key in {*before, *command} if before.get(key) != command.get(key)
            )
            raise ValueError(
                f"{self.folder}: an unfinished preparation with other {', '.join(changed)}; give the same "
                "command to go on, or --fresh to start over"
            )
        journal = self.folder / "journal.json"
        self.state = _read(journal) if journal.is_file() else {}
        if self.state and not (self.folder / "shards").is_dir():  # they have their final name already
            self._clear()
            self.state = {}
            self._claim(command)

    def _clear(self) -> None:
        if any(self.folder.iterdir()) and not (self.folder / "command.json").is_file():
            return  # not ours: `_claim` refuses it
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


class Log:
    """A file that grows. Opened with a length it had, it is cut back to it."""

    def __init__(self, path: Path, length: int = 0) -> None:
        self._path = path
        self._stream: BinaryIO = path.open("r+b" if length else "wb")
        if path.stat().st_size < length:
            self._stream.close()
            raise ShardError(f"{path}: cut short since it was written; --fresh starts over")
        self._stream.truncate(length)
        self._stream.seek(length)

    def write(self, data: bytes) -> None:
        with errors_naming(self._path):
            self._stream.write(data)

    def sync(self) -> int:
        """Put it on the disk. Its length in bytes."""
        with errors_naming(self._path):
            self._stream.flush()
            os.fsync(self._stream.fileno())
        return self._stream.tell()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk does not take is not in the journal either
            self._stream.close()


@contextlib.contextmanager
def errors_naming(path: Path) -> Any:
    """An OSError of a write, which names no file, names this one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def forget(out: Path, command: Mapping[str, Any]) -> None:
    """Remove what a crash left beside `out` after it took its name."""
    folder = out.with_name(f"{out.name}.partial")
    file = folder / "command.json"
    if file.is_file() and _read(file) == command:
        Workplace(out, command).remove()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: damaged; --fresh starts over")
    return found
