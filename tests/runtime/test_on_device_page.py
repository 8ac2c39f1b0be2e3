"""The Python of docs/on-device.md runs as it stands there, one block after the other."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from gguf_files import SHAPE, exported

PAGE = Path(__file__).parents[2] / "docs" / "on-device.md"


def test_the_page_s_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = exported(tmp_path, "Q8_0", replace(SHAPE, head_dim=32, max_position_embeddings=512))
    shutil.copy(file, tmp_path / "my-model.gguf")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert len(blocks) >= 5
    assert "reused=" in capsys.readouterr().out
    assert (tmp_path / "chat.session").is_file()
