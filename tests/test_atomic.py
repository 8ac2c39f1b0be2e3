"""Files and directories that appear whole or not at all, whatever interrupts their writing."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

from mobilellm import atomic
from mobilellm.atomic import (
    atomic_directory,
    atomic_write,
    check_destination,
    check_writable,
    foreign_file,
    hold,
)

STOPS = (KeyboardInterrupt, RuntimeError, SystemExit)


def everything(root: Path) -> dict[str, bytes | None]:
    """Every name under `root`, with the bytes of files."""
    return {
        str(path.relative_to(root)): None if path.is_dir() else path.read_bytes() for path in root.rglob("*")
    }


def test_a_file_appears(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "deep" / "er" / "file") as temporary:
        assert temporary.parent == tmp_path / "deep" / "er"
        temporary.write_bytes(b"new")
        assert not (tmp_path / "deep" / "er" / "file").exists()
    assert everything(tmp_path / "deep") == {"er": None, "er/file": b"new"}


def test_a_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_bytes(b"new")
        assert (tmp_path / "file").read_bytes() == b"old"
    assert everything(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_file_is_as_before(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for name in ("file", "other"):
        with pytest.raises(stop), atomic_write(tmp_path / name) as temporary:
            temporary.write_bytes(b"ne")
            raise stop
    assert everything(tmp_path) == {"file": b"old"}


def test_a_file_never_replaces_a_directory(tmp_path: Path) -> None:
    (tmp_path / "name" / "inside").mkdir(parents=True)
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "name") as temporary:
        temporary.write_bytes(b"new")
    assert everything(tmp_path) == {"name": None, "name/inside": None}


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    with atomic_write(tmp_path / "link") as temporary:
        temporary.write_bytes(b"new")
    assert (tmp_path / "link").is_symlink()
    assert everything(tmp_path) == {"real": b"new", "link": b"new"}


def test_a_directory_appears(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "directory"
    with atomic_directory(path) as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "file").write_bytes(b"1")
        assert not path.exists()
    assert everything(path) == {"inner": None, "inner/file": b"1"}
    assert [item.name for item in path.parent.iterdir()] == ["directory"]


def test_an_empty_directory_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with atomic_directory(tmp_path / "empty") as temporary:
        (temporary / "file").write_bytes(b"1")
    assert everything(tmp_path) == {"empty": None, "empty/file": b"1"}


def test_a_directory_is_kept_unless_told_otherwise(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").write_bytes(b"old")
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=r"full: exists and is not empty; .* --overwrite"):
        atomic_directory(tmp_path / "full").__enter__()
    assert everything(tmp_path) == before
    with atomic_directory(tmp_path / "full", overwrite=True) as temporary:
        (temporary / "new").write_bytes(b"new")
        assert everything(tmp_path / "full") == {"old": b"old"}
    assert everything(tmp_path) == {"full": None, "full/new": b"new"}


def test_an_objection_protects_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").write_bytes(b"old")
    before = everything(tmp_path)

    def objection(path: Path) -> str:
        return "holds a thesis" if (path / "old").exists() else ""

    with pytest.raises(FileExistsError, match=r"full: holds a thesis; it is not overwritten"):
        atomic_directory(tmp_path / "full", True, objection).__enter__()
    assert everything(tmp_path) == before
    check_destination(tmp_path, True, objection)
    for absent in (tmp_path / "absent", tmp_path / "empty"):
        check_destination(absent, False, objection)
        (tmp_path / "empty").mkdir(exist_ok=True)


def test_an_objection_to_what_came_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").write_bytes(b"old")

    def objection(path: Path) -> str:
        return "holds a thesis" if (path / "thesis").exists() else ""

    with (
        pytest.raises(FileExistsError, match="thesis"),
        atomic_directory(tmp_path / "full", True, objection) as temporary,
    ):
        (temporary / "new").write_bytes(b"new")
        (tmp_path / "full" / "thesis").write_bytes(b"mine")
    assert everything(tmp_path) == {"full": None, "full/old": b"old", "full/thesis": b"mine"}


def test_foreign_files_are_found_at_any_depth(tmp_path: Path) -> None:
    known = ("config.json", "*.bin", "cache/*")
    (tmp_path / "cache" / "a" / "b").mkdir(parents=True)
    for name in ("config.json", "x.bin", "cache/a/b/c"):
        (tmp_path / name).write_bytes(b"")
    assert foreign_file(tmp_path, known) is None
    (tmp_path / "empty").mkdir()
    assert foreign_file(tmp_path, known) is None
    (tmp_path / "empty" / "mine").write_bytes(b"")
    assert foreign_file(tmp_path, known) == "empty/mine"
    (tmp_path / "empty" / "mine").unlink()
    (tmp_path / "empty" / "link").symlink_to(tmp_path / "cache")
    assert foreign_file(tmp_path, known) == "empty/link"


@pytest.mark.parametrize("stop", STOPS)
def test_an_interrupted_directory_is_as_before(tmp_path: Path, stop: type[BaseException]) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").write_bytes(b"old")
    before = everything(tmp_path)
    for name in ("full", "other"):
        with pytest.raises(stop), atomic_directory(tmp_path / name, overwrite=True) as temporary:
            (temporary / "new").write_bytes(b"ne")
            raise stop
    assert everything(tmp_path) == before


@pytest.mark.parametrize("failing", [1, 2], ids=["first rename", "second rename"])
@pytest.mark.parametrize("after", [False, True], ids=["before it", "just after it"])
def test_a_stop_during_the_swap_leaves_a_whole_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, after: bool
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "old").write_bytes(b"old")
    calls, rename = [], os.rename

    def interrupted(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == failing and not after:
            raise KeyboardInterrupt
        rename(source, target)
        if len(calls) == failing:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        atomic_directory(tmp_path / "full", overwrite=True) as temporary,
    ):
        (temporary / "new").write_bytes(b"new")
    replaced = failing == 2 and after
    whole = {"full": None, "full/new": b"new"} if replaced else {"full": None, "full/old": b"old"}
    assert everything(tmp_path) == whole


def test_a_directory_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later")
    for name in ("link", "dangling"):
        with atomic_directory(tmp_path / name, overwrite=True) as temporary:
            (temporary / "new").write_bytes(b"new")
        assert (tmp_path / name).is_symlink()
    assert sorted(item.name for item in tmp_path.iterdir()) == ["dangling", "later", "link", "real"]
    assert everything(tmp_path / "real") == everything(tmp_path / "later") == {"new": b"new"}


def test_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with atomic_directory(".") as temporary:
        (temporary / "file").write_bytes(b"1")
    assert everything(tmp_path) == {"here": None, "here/file": b"1"}


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    for overwrite in (False, True):
        with pytest.raises(NotADirectoryError, match="file: is a file; name a directory"):
            check_destination(tmp_path / "file", overwrite)
        with pytest.raises(NotADirectoryError):
            atomic_directory(tmp_path / "file", overwrite).__enter__()
    assert everything(tmp_path) == {"file": b"old"}


@pytest.mark.parametrize("manager", [atomic_write, atomic_directory])
@pytest.mark.parametrize("names_the_temporary", [True, False])
def test_a_full_disk_is_said_of_the_final_name(
    tmp_path: Path, manager: object, names_the_temporary: bool
) -> None:
    assert callable(manager)
    with pytest.raises(OSError, match="No space left") as caught, manager(tmp_path / "name") as temporary:
        raise OSError(
            errno.ENOSPC, os.strerror(errno.ENOSPC), str(temporary) if names_the_temporary else None
        )
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path / "name")
    assert everything(tmp_path) == {}


def test_other_errors_pass_unchanged(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, atomic_directory(tmp_path / "name"):
        (tmp_path / "elsewhere").read_bytes()
    assert caught.value.filename == str(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="no number"), atomic_write(tmp_path / "name"):
        raise OSError("no number")
    assert everything(tmp_path) == {}


def test_everything_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order of fsync and rename, which a test cannot see by looking at the files."""
    order: list[str] = []
    sync, rename = atomic.sync, os.rename

    def noted_sync(path: Path) -> None:
        order.append(path.name.split(".tmp-")[0])
        sync(path)

    def noted_rename(source: Path, target: Path) -> None:
        order.append("rename")
        rename(source, target)

    monkeypatch.setattr(atomic, "sync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    with atomic_directory(tmp_path / "name") as temporary:
        (temporary / "a").write_bytes(b"1")
        (temporary / "b").mkdir()
        (temporary / "b" / "c").write_bytes(b"1")
    assert order == ["a", "b", "c", "name", "rename", tmp_path.name]


def test_what_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file or directory itself."""
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_ino))
    (tmp_path / "file").write_bytes(b"1")
    for path in (tmp_path / "file", tmp_path):
        atomic.sync(path)
    assert flushed == [(tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino]


def test_a_killed_process_leaves_the_old(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "old").write_bytes(b"old")
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from mobilellm.atomic import atomic_directory, atomic_write\n"
        "root = Path(sys.argv[1])\n"
        "with atomic_write(root / 'file') as one, atomic_directory(root / 'directory', True) as two:\n"
        "    one.write_bytes(b'new')\n"
        "    (two / 'new').write_bytes(b'new')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    ended = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (tmp_path / "file").read_bytes() == b"old"
    assert everything(tmp_path / "directory") == {"old": b"old"}
    assert len(list(tmp_path.iterdir())) == 4
    for left in tmp_path.glob("file.tmp-*"):
        os.utime(left, (0, 0))
    with atomic_write(tmp_path / "file") as one, atomic_directory(tmp_path / "directory", True):
        one.write_bytes(b"new")
    assert everything(tmp_path) == {"file": b"new", "directory": None}  # the remains are gone


def test_what_may_still_be_written_is_no_remains(tmp_path: Path) -> None:
    """By another writer of the same names, in this process or on another machine."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    far = tmp_path / f"directory.tmp-{gone.pid}-0123abcd"
    far.mkdir()
    (tmp_path / "file.tmp-mine").write_bytes(b"mine")
    far_file = tmp_path / f"file.tmp-{gone.pid}-0123abcd"
    far_file.write_bytes(b"far")
    with (
        hold(far, ""),
        atomic_write(tmp_path / "file") as one,
        atomic_directory(tmp_path / "directory") as two,
        atomic_write(tmp_path / "file") as three,
        atomic_directory(tmp_path / "directory") as four,
    ):
        assert all(each.parent.is_dir() for each in (one, two / "a", three, four / "a"))
        one.write_bytes(b"1")
        three.write_bytes(b"3")
    assert everything(tmp_path) == {
        "file": b"1", "file.tmp-mine": b"mine", far_file.name: b"far", "directory": None, far.name: None,
    }  # fmt: skip
    with atomic_directory(tmp_path / "directory"):
        assert not far.exists()


def test_what_is_named_alike_is_somebody_elses(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in ("20271127", f"{gone.pid}", f"{gone.pid}-0a", f"{gone.pid}-0123abcd.bak", "old"):
        (tmp_path / f"directory.tmp-{name}").mkdir()
        (tmp_path / f"file.tmp-{name}").write_bytes(b"kept")
        os.utime(tmp_path / f"file.tmp-{name}", (0, 0))
    before = everything(tmp_path)
    with atomic_write(tmp_path / "file") as file, atomic_directory(tmp_path / "directory"):
        file.write_bytes(b"new")
    assert everything(tmp_path) == before | {"file": b"new", "directory": None}


def test_where_nothing_can_be_locked_directories_are_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever writes there could not hold one either."""

    def refuse(descriptor: int, operation: int) -> NoReturn:
        raise OSError(errno.ENOLCK, "No locks available")

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    far = tmp_path / f"directory.tmp-{gone.pid}-0123abcd"
    far.mkdir()
    monkeypatch.setattr(atomic.fcntl, "flock", refuse)
    with atomic_directory(tmp_path / "directory"):
        assert far.exists()
    monkeypatch.undo()
    with atomic_directory(tmp_path / "directory"):
        assert not far.exists()


def test_nothing_is_left_where_the_parent_cannot_be_written(tmp_path: Path) -> None:
    def never() -> NoReturn:
        raise AssertionError("must not get this far")

    (tmp_path / "file").write_bytes(b"")
    for manager in (atomic_write, atomic_directory):
        with pytest.raises((NotADirectoryError, FileExistsError)), manager(tmp_path / "file" / "name"):
            never()
    assert everything(tmp_path) == {"file": b""}


def test_what_cannot_be_written_is_told_before_and_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a read-only file system, where nothing can be removed either."""
    check_writable(tmp_path / "new" / "folders" / "file")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError) as caught:
        check_writable(tmp_path / "file" / "inside" / "x")
    assert caught.value.filename == str(tmp_path / "file")

    def refused(path: Path, *flags: object, **options: object) -> NoReturn:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(OSError, match="Read-only") as told, atomic_write(tmp_path / "name") as temporary:
            refused(temporary)
    assert told.value.filename == str(tmp_path / "name")
    monkeypatch.setattr(os, "access", lambda folder, mode: folder != tmp_path)
    for check in (check_writable, check_destination):
        with pytest.raises(OSError, match="Permission denied") as denied:
            check(tmp_path / "new" / "name")
        assert denied.value.filename == str(tmp_path / "new" / "name")
