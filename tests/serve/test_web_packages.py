"""The packages of the folder: fetched once, checked, kept."""

from __future__ import annotations

import base64
import hashlib
import io
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from static_files import static_server

from mobilellm.serve.web.packages import ONNXRUNTIME, TRANSFORMERS, Package, files_of
from mobilellm.user_cache import user_cache


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that is the registry, and an empty user's cache."""
    folder = tmp_path / "registry"
    folder.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with static_server(folder) as address:
        monkeypatch.setenv("NPM_CONFIG_REGISTRY", address)
        yield folder


def published(registry: Path, content: bytes = b"export default 1;") -> Package:
    """A package with one file, as the registry offers it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        entry = tarfile.TarInfo("package/dist/some.js")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    digest = base64.b64encode(hashlib.sha512(buffer.getvalue()).digest()).decode()
    package = Package("@some/thing", "1.2.3", f"sha512-{digest}", "MIT", {"dist/some.js": "other.js"})
    file = registry / "@some" / "thing" / "-" / "thing-1.2.3.tgz"
    file.parent.mkdir(parents=True)
    file.write_bytes(buffer.getvalue())
    return package


def test_fetches_once(registry: Path) -> None:
    package = published(registry)
    told: list[tuple[str, int, int]] = []
    assert files_of(package, lambda *what: told.append(what)) == {"other.js": b"export default 1;"}
    size = (user_cache() / "npm" / "thing-1.2.3.tgz").stat().st_size
    assert told == [("fetching @some/thing", size, size)]
    (registry / "@some" / "thing" / "-" / "thing-1.2.3.tgz").unlink()
    assert files_of(package) == {"other.js": b"export default 1;"}


def test_takes_only_the_pinned_archive(registry: Path) -> None:
    package = published(registry)
    file = registry / "@some" / "thing" / "-" / "thing-1.2.3.tgz"
    good = file.read_bytes()
    file.write_bytes(good + b"\0")
    with pytest.raises(ValueError, match=r"thing-1.2.3.tgz: is not the archive that is pinned here"):
        files_of(package)
    assert not (user_cache() / "npm").exists()
    file.write_bytes(good)
    files_of(package)
    (user_cache() / "npm" / "thing-1.2.3.tgz").write_bytes(b"damaged")
    assert files_of(package) == {"other.js": b"export default 1;"}  # fetched anew


def test_names_what_cannot_be_fetched(registry: Path) -> None:
    package = published(registry)
    (registry / "@some" / "thing" / "-" / "thing-1.2.3.tgz").unlink()
    with pytest.raises(
        ConnectionError, match=r"@some/thing/-/thing-1.2.3.tgz: cannot be fetched \(HTTP Error 404"
    ):
        files_of(package)


def test_the_wasm_is_of_the_runtime_that_is_in_transformers_js() -> None:
    try:
        script = files_of(TRANSFORMERS)["transformers.min.js"].decode()
    except ConnectionError as error:
        pytest.skip(f"needs the npm registry: {error}")
    assert ONNXRUNTIME.version in script
