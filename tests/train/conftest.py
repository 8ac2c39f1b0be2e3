"""One thread: sums are then made in one order, and a busy machine does not stall small runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from tiny_runs import Runner

# A line for every tensor of every checkpoint would bury what a failing test has to say.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """In every test of this folder."""


@pytest.fixture(scope="package")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()
