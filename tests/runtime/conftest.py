"""Fixtures shared by the tests of the runtime."""

from __future__ import annotations

import pytest

from mobilellm.runtime import engine


@pytest.fixture(params=engine.INSTRUCTION_SETS)
def isa(request: pytest.FixtureRequest) -> str:
    """Each set of instructions in turn; skipped are those that this processor, or this build, does not have."""
    if request.param not in engine.instruction_sets():
        pytest.skip(f"the engine has no {request.param} here")
    return str(request.param)
