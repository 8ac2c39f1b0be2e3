"""Files and directories that appear whole or not at all.

Everything is written beside its final name, flushed to the disk, and renamed: a crash at any byte, a full
disk or a Ctrl-C leaves what was there before. What a killed process was writing, NAME.tmp-…, goes when the
same name is written again, a file an hour later at the earliest. (Only a kill between the two renames that
replace a directory leaves the old one, whole, under NAME.old-….)
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path

_LEFT_BEHIND_SECONDS = 3600
"""Nothing in here writes so long to a file without a byte that is seen."""
_OURS = re.compile(r"([0-9]+)-[0-9a-f]{8}")
"""What `_beside` puts behind NAME.tmp-: what somebody else named alike is not removed."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it is synced and takes the name `path`.

    On any exception the temporary file is removed and `path` is what it was. An OSError names `path`, not the
    temporary file. Where `path` is a link, what it points to is replaced.
    """
    target = _real(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_remains(target)
    temporary = _beside(target)
    try:
        with _errors_name(path, temporary):
            yield temporary
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
    except BaseException:
        with suppress(OSError):  # where nothing could be written, nothing can be removed
            temporary.unlink()
        raise


@contextmanager
def atomic_directory(
    path: str | Path, overwrite: bool = False, objection: Callable[[Path], str] | None = None
) -> Iterator[Path]:
    """Yield an empty temporary directory beside `path`; on success it takes the name `path`.

    An existing non-empty `path` is refused as `check_destination` says, before and after; with `overwrite`
    the old directory keeps its name until the new one is complete, and is deleted only after the swap. Errors
    and links as in `atomic_write`.
    """
    check_destination(path, overwrite, objection)
    target = _real(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear_remains(target)
    temporary = _beside(target)
    try:
        with _errors_name(path, temporary), ExitStack() as stack:
            temporary.mkdir()
            stack.enter_context(hold(temporary, f"{temporary}: another process writes there"))
            yield temporary
            for item in sorted(temporary.rglob("*")):
                sync(item)
            sync(temporary)
            check_destination(path, overwrite, objection)  # much may have been put there meanwhile
            _swap(temporary, target)
    except BaseException:
        _remove(temporary)
        raise


def take_name(
    directory: Path,
    path: str | Path,
    overwrite: bool = False,
    objection: Callable[[Path], str] | None = None,
) -> None:
    """Rename a complete, synced directory to `path`, as `atomic_directory` does with what it wrote."""
    check_destination(path, overwrite, objection)
    sync(directory)
    _swap(directory, _real(path))


def check_writable(path: str | Path) -> None:
    """Raise OSError for a name that nothing can be written under, before the work and not after it.

    Its folder, or the nearest one above it that is there, may be read-only, another user's, or a file.
    """
    folder = _real(path).parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(folder, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(folder).f_flag & os.ST_RDONLY else errno.EACCES
        raise OSError(number, os.strerror(number), str(path))


def check_file_writable(path: str | Path) -> None:
    """As `check_writable`, of what has to be a file: a folder of that name raises IsADirectoryError."""
    check_writable(path)
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path}: is a folder; name a file in it")


def check_destination(
    path: str | Path, overwrite: bool = False, objection: Callable[[Path], str] | None = None
) -> None:
    """Refuse a destination that would lose something. Raises FileExistsError or NotADirectoryError, and as
    `check_writable`.

    A directory that is not empty needs `overwrite`, and `objection` to have none: it is given the directory
    and says in words what shows that it is not an older version of the same thing, or "".
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{path}: is a file; name a directory")
    check_writable(path)
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{path}: exists and is not empty; choose another name or pass --overwrite")
    if objection is not None and (reason := objection(path)):
        raise FileExistsError(f"{path}: {reason}; it is not overwritten, choose another name")


def made_of(marker: str, *others: str) -> Callable[[Path], str]:
    """An objection to folders without a file `marker`, or with one that fits neither it nor `others`."""

    def objection(directory: Path) -> str:
        if not (directory / marker).is_file():
            return f"holds other things (there is no {marker})"
        foreign = foreign_file(directory, (marker, *others))
        return f"holds {foreign}, which does not belong to it" if foreign else ""

    return objection


def foreign_file(directory: Path, known: Collection[str]) -> str | None:
    """The first file in `directory`, by its path inside, that fits none of the patterns of `known`.

    A * in a pattern fits slashes too. A link to a directory counts as a file: what it leads to is elsewhere.
    """
    for folder, folders, files in os.walk(directory):
        folders.sort()
        links = [name for name in folders if Path(folder, name).is_symlink()]
        for name in sorted([*files, *links]):
            inside = Path(folder, name).relative_to(directory).as_posix()
            if not any(fnmatchcase(inside, pattern) for pattern in known):
                return inside
    return None


@contextmanager
def hold(directory: Path, busy: str) -> Iterator[bool]:
    """Hold a directory for this process, which gives it up however it ends.

    Raises ValueError with the text `busy` while another process holds it. Yields whether it is held: not so
    on a file system that cannot lock.
    """
    descriptor, held = os.open(directory, os.O_RDONLY), False
    try:
        with suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                raise ValueError(busy) from None
        yield held
    finally:
        os.close(descriptor)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        sync(target.parent)
        return
    old = target.with_name(f"{target.name}.old-{_random_digits()}")
    try:
        os.rename(target, old)
        os.rename(new, target)
        sync(target.parent)
    finally:  # whatever happened, a Ctrl-C included, one of the two has the name
        if not target.exists():
            os.rename(old, target)
        _remove(old)


@contextmanager
def _errors_name(path: str | Path, temporary: Path) -> Iterator[None]:
    """Make an OSError about the temporary path, or about no path at all (a full disk), name `path`."""
    try:
        yield
    except OSError as error:
        inside = error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(temporary)
        if error.errno is not None and (error.filename is None or inside):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _real(path: str | Path) -> Path:
    """Links followed, "." and ".." resolved: a name that has a parent and can be renamed."""
    return Path(os.path.realpath(path))


def _clear_remains(target: Path) -> None:
    """Remove what processes that are gone were writing under a temporary name of `target`.

    A process of another machine may be writing there, too: it holds its directory, and its file is young.
    """
    for path in target.parent.glob(f"{escape(target.name)}.tmp-*"):
        ours = _OURS.fullmatch(path.name.removeprefix(f"{target.name}.tmp-"))
        if ours is None or _is_running(int(ours[1])):
            continue
        with suppress(OSError, ValueError):
            if not path.is_dir():
                if time.time() - path.stat().st_mtime > _LEFT_BEHIND_SECONDS:
                    path.unlink()
                continue
            with hold(path, "") as held:
                if held:
                    _remove(path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.tmp-{os.getpid()}-{_random_digits()}")


def _random_digits() -> str:
    return os.urandom(4).hex()


def _remove(directory: Path) -> None:
    import shutil  # here: it brings in every kind of archive, and most who write a file remove no directory

    shutil.rmtree(directory, ignore_errors=True)


def sync(path: Path) -> None:
    """Flush a file to the disk, or make the names in a directory last."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
