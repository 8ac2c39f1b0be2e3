"""Fixtures shared by all tests."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest

if TYPE_CHECKING:
    from mobilellm.model.cpu_kernels import Kernels

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # A shell starts background jobs so, and what the tests start would inherit it: no Ctrl-C would reach it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command line does, before torch is imported

# The same examples each time, so that a failure is of the change at hand, and no clock, for machines are busy:
# 50 of them in `make test`, 100 in `make test-all`; `--hypothesis-profile explore` looks for others, and longer.
_PATIENT = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("quick", derandomize=True, max_examples=50, **_PATIENT)  # type: ignore[arg-type]
hypothesis.settings.register_profile("whole", derandomize=True, max_examples=100, **_PATIENT)  # type: ignore[arg-type]
hypothesis.settings.register_profile("explore", max_examples=1000, **_PATIENT)  # type: ignore[arg-type]
hypothesis.settings.load_profile("quick")

_SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not walk through torch's million objects each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data beside the checkout; tests that need it skip where it is absent."""
    if not (_SHARED / "data").is_dir():
        pytest.skip("needs the real data of ../shared, which is not beside this checkout")
    return _SHARED / "data"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums are then made in one order, and a busy machine does not stall small runs."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def kernels() -> Kernels:
    """The kernels for training on a CPU; tests that need them skip where they cannot be compiled."""
    from mobilellm.model import cpu_kernels

    found = cpu_kernels.load()
    if isinstance(found, str):
        pytest.skip(f"no kernels for training on this machine: {found}")
    return found


@pytest.fixture(scope="session")
def small_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text file of about 200 kB of real prose that every Python installation carries."""
    from pydoc_data.topics import topics

    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text("\n\n".join(topics[name] for name in sorted(topics))[:200_000], encoding="utf-8")
    return file
