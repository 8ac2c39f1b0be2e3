"""One thread: sums are then made in one order, and a busy machine does not stall small runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from tiny_runs import Runner

# A line for every tensor of every checkpoint would bury what a failing test has to say.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def runner() -> Iterator[Runner]:
    runner = Runner()
    yield runner
    runner.close()
