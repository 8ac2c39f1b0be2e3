"""The picture at the top of README says what the files of docs/results say."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_ratio_is_there_and_in_readme() -> None:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("picture", ROOT / "benchmarks" / "picture.py")
    assert spec is not None
    assert spec.loader is not None
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)
    ratios = picture.ratios(ROOT / "docs" / "results")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len({ratio.what for ratio in ratios}) == 14
    for ratio in ratios:
        told = {f"{ratio.value + 1e-6:.{digits}f}×" for digits in (1, 2)}
        assert any(each in readme for each in told), ratio
    assert picture.drawn(ratios).startswith(b"\x89PNG")
