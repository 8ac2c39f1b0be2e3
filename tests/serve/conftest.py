from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from serving import Running


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    serving = pytest.importorskip("serving")
    return serving.write_model(tmp_path_factory.mktemp("served") / "small.gguf")


@pytest.fixture(scope="session")
def server(chat_file: Path) -> Iterator[Running]:
    """With eight slots and room for the load of the tests; nothing in it depends on the test before."""
    import serving

    with serving.serving(chat_file, "--max-body", "200000", "--patience", "2") as running:
        yield running
