"""Files, directories, and links as caches have them."""

from __future__ import annotations

from pathlib import Path

from mobilellm.bytes_on_disk import bytes_on_disk


def test_a_file_a_directory_and_links(tmp_path: Path) -> None:
    (tmp_path / "m" / "onnx").mkdir(parents=True)
    (tmp_path / "m" / "config.json").write_bytes(b"x" * 10)
    (tmp_path / "m" / "onnx" / "model.onnx").write_bytes(b"x" * 500)
    (tmp_path / "blob").write_bytes(b"x" * 7)
    (tmp_path / "m" / "linked").symlink_to("../blob")
    assert bytes_on_disk(tmp_path / "m" / "config.json") == 10
    assert bytes_on_disk(tmp_path / "m") == 10 + 500 + 7
    assert bytes_on_disk(tmp_path / "absent") == 0
