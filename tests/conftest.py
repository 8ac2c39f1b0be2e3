"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

_SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it is absent."""
    if not (_SHARED / "data").is_dir():
        pytest.skip("needs the real data of ../shared, which is not beside this checkout")
    return _SHARED / "data"
