"""What the command line says of a mistake."""

from __future__ import annotations

import pytest

from mobilellm.cli.main import _main


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error; nothing is printed, and the exit code is 2."""
    capsys.readouterr()
    assert _main([str(each) for each in arguments]) == 2, arguments
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("mobilellm: error: ")
    assert said.err.count("\n") == 1, said.err
    return said.err
