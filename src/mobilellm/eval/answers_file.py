"""The SQLite file in which answers are kept: keys and values of bytes, each with a checksum."""

from __future__ import annotations

import sqlite3
import time
import zlib
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

_PATIENCE = 30.0
"""Seconds to wait for another process that writes."""
_SHARE, _SECONDS = 0.03, 1.0
"""Writing may take this share of the time; within it each answer is written by itself, and in any case after
so many seconds. So a slow model loses nothing when it is killed, and a quick one is not held up."""


class AnswersFile:
    """Tables "likelihoods" and "texts" of (key, value, checksum) for what `key` describes.

    Raises OSError or sqlite3.OperationalError for a file that cannot be used here and now, and ValueError
    with one line for one that is damaged or holds something else.
    """

    def __init__(self, file: Path, key: dict[str, str]) -> None:
        self._file = file
        self._pending: list[tuple[str, bytes, bytes]] = []
        self._begun = self._flushed = time.monotonic()
        self._spent = 0.0
        file.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(file, timeout=_PATIENCE, isolation_level=None)
        try:
            self._open(key)
        except BaseException as error:
            self.close()
            if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
                raise self._damaged(str(error)) from None
            raise

    def find(self, table: str, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """Those of the keys that are kept, each with its value."""
        found: dict[bytes, bytes] = {}
        query = f"SELECT value, checksum FROM {table} WHERE key = ?"
        try:
            for key in keys:
                row = self._database.execute(query, (key,)).fetchone()
                if row is None:
                    continue
                value, checksum = row
                if not isinstance(value, bytes) or checksum != _checksum(key, value):
                    raise self._damaged("a checksum is wrong")
                found[key] = value
        except sqlite3.OperationalError:
            raise
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from None
        return found

    def keep(self, table: str, key: bytes, value: bytes) -> None:
        self._pending.append((table, key, value))
        now = time.monotonic()
        if self._spent < _SHARE * (now - self._begun) or now - self._flushed > _SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is pending, in one short transaction."""
        if not self._pending:
            return
        start = time.monotonic()
        self._database.execute("BEGIN IMMEDIATE")
        try:
            for table, key, value in self._pending:
                row = (key, value, _checksum(key, value))
                self._database.execute(f"INSERT OR IGNORE INTO {table} VALUES (?, ?, ?)", row)
        except BaseException:
            with suppress(sqlite3.Error):
                self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")
        self._pending.clear()
        self._flushed = time.monotonic()
        self._spent += self._flushed - start

    def close(self) -> None:
        with suppress(sqlite3.Error):
            self._database.close()

    def _open(self, key: dict[str, str]) -> None:
        self._write_ahead()
        # In this mode a commit waits for no disk; a loss of power costs the last answers, not the file.
        self._database.execute("PRAGMA synchronous = NORMAL")
        self._database.execute("BEGIN IMMEDIATE")
        with closing(self._database.execute("SELECT name FROM sqlite_master")) as names:
            is_new = not names.fetchall()
        if is_new:
            self._database.execute("CREATE TABLE model (key TEXT PRIMARY KEY, value TEXT)")
            for table in ("likelihoods", "texts"):
                columns = "key BLOB PRIMARY KEY, value BLOB, checksum INTEGER"
                self._database.execute(f"CREATE TABLE {table} ({columns})")
            self._database.executemany("INSERT INTO model VALUES (?, ?)", key.items())
        try:
            stated = dict(self._database.execute("SELECT key, value FROM model"))
        except sqlite3.OperationalError:  # no such table
            stated = {}
        self._database.execute("COMMIT")
        if stated != key:
            raise ValueError(
                f"{self._file}: holds other things than the answers of this model; move it away or delete it"
            )

    def _write_ahead(self) -> None:
        """Readers and a writer at once, where the file system can do it. Another process may be at it too."""
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                self._database.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def _damaged(self, reason: str) -> ValueError:
        return ValueError(
            f"{self._file}: kept answers are damaged ({reason}); delete the file, and they are computed again"
        )


def _checksum(key: bytes, value: bytes) -> int:
    return zlib.crc32(value, zlib.crc32(key))
