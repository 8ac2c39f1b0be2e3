"""Notices beside what a command prints."""

from __future__ import annotations

import sys


def say(message: str) -> None:
    """A line on standard error: standard output is for what was asked for, which may go into a pipe."""
    print(f"mobilellm: {message}", file=sys.stderr, flush=True)
