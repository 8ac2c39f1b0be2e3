"""From what a person types to a model directory; of what is none, one line."""

from __future__ import annotations

from pathlib import Path

import huggingface_hub.constants
import pytest

from mobilellm import hub
from mobilellm.hub import resolve


def test_no_such_directory(tmp_path: Path) -> None:
    for source in (tmp_path / "absent", "./absent", "absent", "a/b/c", "~no-such-user/x", "-x/y", "a b/c"):
        with pytest.raises(FileNotFoundError, match="no such directory; name a model directory") as caught:
            resolve(source, print)
        assert "\n" not in str(caught.value)
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="file: is no model; name a model directory"):
        resolve(tmp_path / "file", print)


def test_a_gguf_file_is_known_by_the_end_of_its_name(tmp_path: Path) -> None:
    for name, words in (("m.gguf", "is a .gguf file, which is there to be run"), ("m.GGUF", "rename it")):
        (tmp_path / name).write_bytes(b"GGUF")
        with pytest.raises(FileNotFoundError, match=words):
            resolve(tmp_path / name, print)


def test_an_empty_name_is_not_the_folder_one_stands_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of a variable that is not set."""
    (tmp_path / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    assert resolve(Path("."), print) == Path(".")
    with pytest.raises(FileNotFoundError, match="^'' names no model; name a model directory"):
        resolve("", print)


def test_a_path_is_not_taken_for_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """runs/quikstart looks like a Hub id; where runs/ is here, nothing is asked of any network."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "quickstart").mkdir(parents=True)
    monkeypatch.setattr(hub, "_download", lambda *_: pytest.fail("went to the Hub"))
    with pytest.raises(FileNotFoundError, match="no such directory; runs is here and holds quickstart"):
        resolve("runs/quikstart", print)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of Hub models, and no Hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.usefixtures("hub_cache")
def test_a_hub_id_offline_is_one_line() -> None:
    with pytest.raises(FileNotFoundError) as caught:
        resolve("nobody/no-such-model", print)
    said = str(caught.value)
    assert said.startswith(
        "nobody/no-such-model: no such directory, and as a Hub id: HF_HUB_OFFLINE is set; nothing of it "
    )
    assert "\n" not in said


def test_a_hub_id_in_the_cache_is_found_offline(hub_cache: Path) -> None:
    """A cache as huggingface_hub lays it out, with a link to every file."""
    cached = hub_cache / "models--nobody--a-model"
    snapshot = cached / "snapshots" / "0123456789012345678901234567890123456789"
    snapshot.mkdir(parents=True)
    (cached / "blobs").mkdir()
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(snapshot.name, encoding="utf-8")
    for name, text in (("config.json", "{}"), ("README.md", "---\nlicense: cc-by-nc-4.0\n---\n")):
        (cached / "blobs" / name).write_text(text)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    said: list[str] = []
    assert resolve("nobody/a-model", said.append) == snapshot
    assert said[-1] == "nobody/a-model: licence cc-by-nc-4.0"  # of the card in the cache
