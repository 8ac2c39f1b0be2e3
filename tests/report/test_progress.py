"""Progress: plain lines where nobody watches, a bar where somebody does, numbers that are right."""

from __future__ import annotations

import io
import re
import sys
from typing import Any

import pytest

from mobilellm.report.progress import TrainingProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def steps(count: int, first: int = 1, seconds: float = 0.5) -> list[dict[str, Any]]:
    return [
        {"step": step, "tokens": 100 * step, "loss": float(step), "seconds": seconds}
        for step in range(first, count + 1)
    ]


def show(records: list[dict[str, Any]], total: int, done: int = 0) -> None:
    with TrainingProgress(total, done) as progress:
        for record in records:
            progress.update(record)


def test_plain_lines_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    show(steps(50), 50)
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert [line.split()[1] for line in lines] == [f"{step}/50" for step in range(5, 51, 5)]
    assert lines[-1] == "      step 50/50  loss 45.500  200 tokens/s"  # the mean of steps 41 to 50
    assert "\x1b" not in captured.out


@pytest.mark.parametrize(("total", "count"), [(1, 1), (7, 7), (10, 10), (25, 13), (1000, 10)])
def test_about_ten_lines(capsys: pytest.CaptureFixture[str], total: int, count: int) -> None:
    show(steps(total), total)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == count
    assert lines[-1].startswith(f"      step {total}/{total}  ")


def test_going_on_counts_its_own_tokens_only(capsys: pytest.CaptureFixture[str]) -> None:
    """The first record after a resumption says how many tokens there were before, too."""
    show(steps(20, first=20), 20, done=19)
    assert capsys.readouterr().out == "      step 20/20  loss 20.000  200 tokens/s\n"


def test_the_rate_forgets(capsys: pytest.CaptureFixture[str]) -> None:
    slow, fast = steps(100, seconds=10.0), steps(200, first=101, seconds=0.1)
    show(slow + fast, 200)
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].endswith("  10 tokens/s  16 min 40 s left")  # 100 steps of 100 tokens at 10 a second
    rate = float(lines[-1].split()[-2].replace(",", ""))
    assert 950 < rate <= 1000


def test_a_line_a_minute_in_a_long_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(0, 100_000, 7))  # seconds: one look at the clock a step
    monkeypatch.setattr("mobilellm.report.progress.time.monotonic", lambda: next(clock))
    with TrainingProgress(10_000, 0) as progress:
        for record in steps(30):
            progress.update(record)
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == [
        "9/10000", "18/10000", "27/10000",
    ]  # fmt: skip


def test_other_records_and_instant_steps(capsys: pytest.CaptureFixture[str]) -> None:
    show([{"step": 0, "eval": {"loss": 1.0}}, *steps(1, seconds=0.0)], 1)
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" {6}step 1/1  loss 1.000  [\d,]+ tokens/s", line)


def test_a_loss_that_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    show([steps(1)[0] | {"loss": float("nan")}], 1)
    assert "loss nan" in capsys.readouterr().out


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    show(steps(50), 50)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert "step 50/50  loss 45.500  200 tokens/s" in shown
    assert "100%" in shown
    assert "━" in shown
    assert capsys.readouterr().out == ""  # the bar says it all


def test_the_time_left_of_slow_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 45 seconds each, half a run away from the end; it was resumed there, which is no speed."""
    terminal, now = Terminal(), [0.0]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("rich.console.monotonic", lambda: now[0])
    with TrainingProgress(200, 90) as progress:
        for record in steps(100, first=91, seconds=45.0):
            now[0] += 45
            progress.update(record)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
    assert shown.strip().endswith("1:15:00")  # a hundred steps


def test_the_terminal_is_whole_again_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with pytest.raises(KeyboardInterrupt), TrainingProgress(10, 0) as progress:
        progress.update(steps(1)[0])
        raise KeyboardInterrupt
    hidden, shown = "\x1b[?25l", "\x1b[?25h"  # the cursor
    assert terminal.getvalue().count(hidden) == terminal.getvalue().count(shown) == 1
