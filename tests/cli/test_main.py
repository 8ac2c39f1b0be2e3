"""The command line whatever its streams are, and its complaints: one line that names what was typed."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from absent_packages import without
from mobilellm.cli import chat
from mobilellm.cli.main import VERBS, _main, _with_flags, one_line
from mobilellm.cli.parse import parse
from mobilellm.layouts import config_json
from mobilellm.presets import preset

COMMAND = f"{sys.executable} -m mobilellm"
PRINTING = ["--help", "--version", "info", "info 125m", "info --json", "cost", "generate --help"]


def shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | environment,
    )


@pytest.mark.parametrize(
    ("arguments", "unbuffered"), [*((each, "") for each in PRINTING), ("--help", "1"), ("info --json", "1")]
)
def test_an_output_that_is_full(arguments: str, unbuffered: str) -> None:
    done = shell(f"{COMMAND} {arguments} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr == "mobilellm: error: standard output: No space left on device\n"


@pytest.mark.parametrize("arguments", ["--help", "info", "info --json", "generate --help"])
def test_an_output_that_is_closed(arguments: str) -> None:
    done = shell(f"{COMMAND} {arguments} >&-")
    assert (done.returncode, done.stderr) == (0, "")


def test_errors_with_nowhere_to_say_them() -> None:
    for where in ("2>&-", "2>/dev/full", ">&- 2>&-", "<&- >&- 2>&-"):
        done = shell(f"{COMMAND} info nonsense {where}")
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


def test_a_terminal_that_is_not_unicode(tmp_path: Path) -> None:
    """What it cannot show does not end a command."""
    (tmp_path / "ü").mkdir()
    (tmp_path / "ü" / "config.json").write_text(
        json.dumps(config_json(preset("test"), "mobilellm", "float32"))
    )
    done = shell(f"{COMMAND} info {tmp_path}/ü | grep ^model", PYTHONIOENCODING="ascii")
    assert (done.stdout.split("/")[-1], done.stderr) == ("\\xfc\n", "")


def test_the_home_folder_after_an_equals_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    done = shell(f"{COMMAND} eval table --size 125m --json=~/t.json", HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert [path.name for path in (tmp_path / "home").iterdir()] == ["t.json"]


def test_a_text_after_an_equals_sign_is_left_as_it_is() -> None:
    assert parse("chat", chat, ["m", "--system=~/x", "--message=~/y", "--save=~/z"]) == chat.Arguments(
        "m", message=("~/y",), system="~/x", save=Path.home() / "z"
    )


def test_a_closed_stream_is_not_the_next_file(tmp_path: Path) -> None:
    """The lowest free number is given to the next file opened, and what is printed would end up in it."""
    script = (
        "import sys; from mobilellm.cli.main import _open_what_is_closed; _open_what_is_closed(); "
        f"file = open({str(tmp_path / 'file')!r}, 'w'); print('x', flush=True); sys.exit(file.fileno() < 3)"
    )
    for closed in ("<&-", ">&-", "<&- >&-", "2>&-"):
        assert shell(f'{sys.executable} -c "{script}" {closed}').returncode == 0, closed
        assert (tmp_path / "file").read_text() == ""


def terminal(arguments: list[str], columns: int, **environment: str) -> str:
    """What a terminal of that width is sent."""
    child, descriptor = pty.fork()
    if child == 0:
        os.execve(
            sys.executable,
            [sys.executable, "-m", "mobilellm", *arguments],
            os.environ | {"TERM": "xterm"} | environment,
        )
    fcntl.ioctl(descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    sent = b""
    while True:
        try:
            part = os.read(descriptor, 65536)
        except OSError:  # Linux says so that the other side has ended
            part = b""
        if not part:
            break
        sent += part
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return sent.decode()


@pytest.mark.parametrize("arguments", [["info", "--help"], ["info"], ["--help"]], ids=" ".join)
def test_no_colour_where_none_is_wanted(arguments: list[str]) -> None:
    assert "\x1b" not in terminal(arguments, 100, NO_COLOR="1")
    if arguments == ["info", "--help"]:
        assert "\x1b" in terminal(arguments, 100, NO_COLOR="")
    assert "\x1b" not in shell(f"{COMMAND} {' '.join(arguments)}").stdout


@pytest.mark.parametrize("columns", [1, 40])
def test_narrow_terminals(columns: int) -> None:
    """Nothing fails, and no word of a table is lost."""
    for arguments in (["generate", "--help"], ["cost"], ["info", "125m"]):
        terminal(arguments, columns)
    assert "124,635,456" in terminal(["info"], columns)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _main([verb, "--help"]) == 0
    captured = capsys.readouterr()
    assert f"usage: mobilellm {verb}" in captured.out
    assert captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("cost --devices 0", "--devices 0 must be positive"),
        ("cost --peak-tflops=-1", "--peak-tflops -1 must be positive"),
        ("cost --mfu 2", "--mfu 2 must be above 0"),
        ("cost --tokens zero", "--tokens 'zero' must be"),
    ],
)
def test_complaints_name_the_flag_that_was_typed(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(arguments.split()) == 2
    assert words in capsys.readouterr().err


def test_only_typed_flags_are_named() -> None:
    message = "train: micro_batch = 3 and learning_rate = 0.0 of the file x-micro_batch = 3"
    assert _with_flags(message, ["--steps", "5"]) == message
    assert _with_flags(message, ["--settings.micro-batch", "3"]) == (
        "train: --settings.micro-batch 3 and learning_rate = 0.0 of the file x-micro_batch = 3"
    )


@pytest.mark.parametrize(
    ("verb", "extra"), [("generate", "torch"), ("convert", "torch"), ("quantize", "export"), ("web", "onnx")]
)
def test_a_package_that_is_not_installed(verb: str, extra: str, tmp_path: Path) -> None:
    """What is told to be installed is all that the verb needs, not the first package alone."""
    script = without("torch") + "from mobilellm.cli.main import main; main()"
    arguments = [str(tmp_path), "x", *(("--to", "llama") if verb == "convert" else ())]
    done = subprocess.run(
        [sys.executable, "-c", script, verb, *arguments],
        capture_output=True, text=True, timeout=300, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"mobilellm: error: {verb} needs the package 'torch'; install it with: ")
    assert done.stderr.endswith(f'python -m pip install -c constraints.txt -e ".[{extra}]"\n')
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("verb", "package", "extras"),
    [
        ("finetune", "peft", "train,finetune"),
        ("train", "torch", "train"),
        ("quantize", "matplotlib", "export,plots"),
    ],
)
def test_a_package_that_the_verb_does_not_always_need(verb: str, package: str, extras: str) -> None:
    """With LoRA, say, or for a picture: the extra of the verb alone would not bring it."""
    said = one_line(ModuleNotFoundError(f"No module named {package!r}", name=package), verb)
    assert f"[{extras}]" in said


def test_no_memory_is_said_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(verb: str, rest: list[str]) -> None:
        raise MemoryError(f"no memory for {verb}")

    monkeypatch.setattr("mobilellm.cli.main._run", fail)
    assert _main(["generate"]) == 2
    assert capsys.readouterr().err == "mobilellm: error: no memory for generate\n"
