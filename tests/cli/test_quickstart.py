"""The quickstart as a person uses it: a run, a second look, Ctrl-C and going on, and its refusals."""

from __future__ import annotations

import contextlib
import html
import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.numpy

from absent_packages import without
from mobilellm import installation
from mobilellm.accounting import stored_parameters
from mobilellm.atomic import hold
from mobilellm.cli.main import _main
from mobilellm.cli.quickstart_folder import what_is_kept
from mobilellm.config import ModelConfig
from mobilellm.train.recipe import load_recipe

STEPS = 12


def quickstart(folder: Path, *flags: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "mobilellm",
        "quickstart",
        "--out",
        str(folder),
        "--steps",
        str(STEPS),
        *flags,
    ]


def finish(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def small_text(small_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A part of it is enough here, and is tokenised, evaluated and trained on in a third of the time."""
    file = tmp_path_factory.mktemp("text") / "some-topics.txt"
    file.write_text(small_text.read_text(encoding="utf-8")[:60_000], encoding="utf-8")
    return file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, small_text: Path) -> tuple[Path, str]:
    """A run that nothing interrupted, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("quickstart") / "run", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert _main(command_of(folder, small_text)) == 0
    return folder, printed.getvalue()


def test_makes_everything(whole: tuple[Path, str]) -> None:
    folder, printed = whole
    for stage in range(1, 7):
        assert f"[{stage}/6]" in printed
    results = json.loads((folder / "report.json").read_text())
    assert results["after"]["bits_per_byte"] < 0.9 * results["before"]["bits_per_byte"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert f"{results['after']['bits_per_byte']:.3f}" in page
    assert "http://" not in page
    assert "https://" not in page
    assert (folder / "model" / "model.safetensors").is_file()
    assert "tokens/s" in printed


def test_second_time_is_quick_and_trains_nothing(
    whole: tuple[Path, str], small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _ = whole
    before = (folder / "metrics.jsonl").read_bytes()
    assert _main(command_of(folder, small_text)) == 0
    printed = capsys.readouterr().out
    assert "complete" in printed
    assert "pretraining" not in printed
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_report_knows_it_as_a_run(
    whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As one of `mobilellm train`, which can do it again by the recipe that lies there."""
    results = json.loads((whole[0] / "report.json").read_text())
    assert _main(["report", str(whole[0]), "--out", str(tmp_path / "report"), "--json"]) == 0
    (run,) = json.loads(capsys.readouterr().out)["runs"]
    assert (run["name"], run["planned_steps"], run["world_size"]) == ("run", STEPS, 1)
    assert run["parameters"] == stored_parameters(ModelConfig.from_dict(results["config"])).total
    assert run["device"].startswith("CPU, ")
    assert run["held_out_last"] == {"step": STEPS, **results["after"]}
    recipe = load_recipe(str(whole[0] / "recipe.toml"))
    assert recipe.model.config(results["config"]["vocab_size"]).to_dict() == results["config"]
    assert (recipe.steps, recipe.data.train) == (STEPS, (whole[0] / "shards",))


def test_what_is_refused_is_not_announced(
    copy: Path, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "report.json").unlink()
    state = max((copy / "checkpoints").iterdir()) / "state.json"
    values = json.loads(state.read_text())
    values["identity"]["optim.lr"] = 0.03
    del values["sha256"]
    state.write_text(json.dumps(values))
    assert _main(command_of(copy, small_text)) == 2
    shown = capsys.readouterr()
    assert "optim.lr = 0.03, not 0.02" in shown.err
    assert "pretraining" not in shown.out


def test_run_directory_generates(whole: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    assert _main(["generate", str(whole[0]), "Return a", "--max-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("Return a")


@pytest.mark.slow
def test_ctrl_c_and_going_on_gives_the_same_model(
    whole: tuple[Path, str], tmp_path: Path, small_text: Path
) -> None:
    folder = tmp_path / "run"
    command = quickstart(folder, "--text", str(small_text))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _wait_for(
        lambda: '"loss"' in _text(folder / "metrics.jsonl") and '"step": 3' in _text(folder / "metrics.jsonl")
    )
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    assert "goes on" in printed
    assert not (folder / "report.json").exists()
    finish([sys.executable, "-m", "mobilellm", "generate", str(folder), "It", "--max-tokens", "3"])
    assert "going on after step " in finish(command)
    ours, theirs = (
        safetensors.numpy.load_file(path / "model" / "model.safetensors") for path in (folder, whole[0])
    )
    for name, tensor in theirs.items():
        assert (ours[name] == tensor).all(), name


@pytest.mark.slow
def test_ctrl_c_while_preparing(tmp_path: Path, small_text: Path) -> None:
    folder = tmp_path / "run"
    command = quickstart(folder, "--text", str(small_text))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    _wait_for(lambda: (folder / "quickstart.json").exists())
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    assert "same command" in printed
    finish(command)


def test_fresh_deletes_only_what_the_run_made(tmp_path: Path, small_text: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "quickstart.json").write_text("{}")
    (folder / "mine.txt").write_text(small_text.read_text())
    assert _main([*command_of(folder, folder / "mine.txt"), "--steps", "1", "--fresh"]) == 0
    assert (folder / "mine.txt").is_file()


def test_a_folder_stands_for_its_text_files(
    whole: tuple[Path, str], small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _main(command_of(whole[0], small_text.parent)) == 0
    assert "This run is complete" in capsys.readouterr().out


def test_refusals(whole: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = whole
    other = tmp_path / "other.txt"
    other.write_text("other text " * 1000)
    empty = tmp_path / "empty.txt"
    empty.write_text("  \n")
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.txt").write_text("mine")
    for flags, words in (
        (["--out", str(folder), "--text", str(other)], ["--fresh", str(folder)]),
        (["--out", str(tmp_path / "taken")], ["not a quickstart run", "thesis.txt"]),
        (["--out", str(tmp_path / "taken"), "--fresh"], ["not a quickstart run", "thesis.txt"]),
        (["--out", str(other)], ["is a file"]),
        (["--out", str(other / "inside")], ["Not a directory"]),
        (["--out", str(tmp_path / "a"), "--text", str(tmp_path / "absent.txt")], ["absent.txt"]),
        (["--out", str(tmp_path / "a"), "--text", str(nothing)], ["nothing: holds no text file"]),
        (["--out", str(tmp_path / "b"), "--text", str(empty)], ["empty.txt", "no text"]),
        (["--out", str(tmp_path / "c"), "--text", str(other)], ["more text"]),
        (["--out", str(tmp_path / "d"), "--steps", "0"], ["--steps 0"]),
        (["--out", str(tmp_path / "d"), "--seed", "-1"], ["--seed -1"]),
    ):
        line = refusal(capsys, *flags)
        for word in words:
            assert word in line
    assert (tmp_path / "taken" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty.txt",
        "nothing",
        "other.txt",
        "taken",
    ]


def test_a_failed_start_claims_nothing(
    tmp_path: Path, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Too little text, then enough of it, in the same folder, which was there before."""
    folder, little = tmp_path / "run", tmp_path / "little.txt"
    folder.mkdir()
    little.write_text("too little")
    assert "10 bytes of text are too few to learn from" in refusal(
        capsys, "--out", str(folder), "--text", str(little)
    )
    assert list(folder.iterdir()) == []
    assert _main([*command_of(folder, small_text), "--steps", "1"]) == 0


def test_what_a_kill_during_preparation_leaves_is_no_claim(tmp_path: Path, small_text: Path) -> None:
    folder = tmp_path / "run"
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    (folder / "quickstart.json").write_text('{"text": ["another"]}')
    (folder / "shards.tmp-12-ab").mkdir()
    (folder / "shards.tmp-12-ab" / "train-00000.bin").write_bytes(b"1")
    assert _main([*command_of(folder, small_text), "--steps", "1"]) == 0
    assert not list(folder.glob("*.tmp-*"))


@pytest.fixture
def copy(whole: tuple[Path, str], tmp_path: Path) -> Path:
    """The whole run, to be damaged."""
    return shutil.copytree(whole[0], tmp_path / "copy")


@pytest.mark.parametrize(
    "gone",
    ["model", "report.html", "loss.png", "report.json", "model/model.safetensors", "model/tokenizer.json"],
)
def test_complete_is_what_is_all_there(
    copy: Path, small_text: Path, whole: tuple[Path, str], gone: str
) -> None:
    """What is missing is made again from the checkpoint, without training."""
    metrics = (copy / "metrics.jsonl").read_bytes()
    if (copy / gone).is_dir():
        shutil.rmtree(copy / gone)
    else:
        (copy / gone).unlink()
    assert _main(command_of(copy, small_text)) == 0
    assert (copy / gone).exists()
    assert (copy / "metrics.jsonl").read_bytes() == metrics
    for name in ("report.json", "model/model.safetensors", "loss.png"):
        assert (copy / name).read_bytes() == (whole[0] / name).read_bytes()


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"before": 1}', ""])
def test_a_damaged_report_is_made_again(copy: Path, small_text: Path, content: str) -> None:
    good = (copy / "report.json").read_bytes()
    (copy / "report.json").write_text(content)
    assert _main(command_of(copy, small_text)) == 0
    assert (copy / "report.json").read_bytes() == good


def test_a_complete_run_needs_no_metrics(
    copy: Path, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "metrics.jsonl").unlink()
    assert _main(command_of(copy, small_text)) == 0
    assert "complete" in capsys.readouterr().out


def test_shards_of_an_earlier_version_which_kept_the_tokenizer_beside_them(
    copy: Path, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "shards" / "tokenizer").rename(copy / "tokenizer")
    assert _main(command_of(copy, small_text)) == 0
    assert "complete" in capsys.readouterr().out
    (copy / "report.json").unlink()
    line = refusal(capsys, *command_of(copy, small_text)[1:])
    assert f"{copy / 'shards'}: holds no tokenizer; --fresh deletes the run and starts over" in line


def test_a_report_is_not_made_of_half_the_metrics(
    copy: Path, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run whose first steps are not recorded must not call the middle "before"."""
    (copy / "report.json").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    before = contents(copy)
    for kept in ("", "".join(lines[5:]), "".join(lines[1:])):
        (copy / "metrics.jsonl").write_text(kept)
        line = refusal(capsys, *command_of(copy, small_text)[1:])
        assert f"{copy / 'metrics.jsonl'}: " in line
        assert "--fresh" in line
    (copy / "metrics.jsonl").unlink()
    assert f"{copy / 'metrics.jsonl'}: " in refusal(capsys, *command_of(copy, small_text)[1:])
    (copy / "metrics.jsonl").write_text("".join(lines))
    assert contents(copy) == before


@pytest.mark.parametrize("file", ["quickstart.json", "shards/index.json", "shards/tokenizer/tokenizer.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_damaged_files_are_named(
    copy: Path, small_text: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes
) -> None:
    (copy / "report.json").unlink()
    (copy / file).write_bytes(content)
    assert f"error: {copy / file}: " in refusal(capsys, *command_of(copy, small_text)[1:])


def test_foreign_files_stop_fresh(copy: Path, small_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model/thesis.txt", "checkpoints/thesis.txt", "shards/mine/x", "tokenizer/thesis.txt"):
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
        before = contents(copy)
        line = refusal(capsys, *command_of(copy, small_text)[1:], "--fresh")
        assert f"holds {name.partition('/')[2]}, which" in line
        assert contents(copy) == before
        (copy / name).unlink()


def test_foreign_files_in_the_model_are_told_before_the_training(
    copy: Path, small_text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "report.json").unlink()
    (copy / "model" / "thesis.txt").write_text("mine")
    assert "holds thesis.txt" in refusal(capsys, *command_of(copy, small_text)[1:])
    assert (copy / "model" / "thesis.txt").read_text() == "mine"


def test_fresh_deletes_a_link_and_not_what_it_leads_to(copy: Path, tmp_path: Path, small_text: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (copy / "model").rename(elsewhere)
    (copy / "model").symlink_to(elsewhere)
    before = contents(elsewhere)
    assert _main([*command_of(copy, small_text), "--fresh", "--steps", "1"]) == 0
    assert contents(elsewhere) == before
    assert not (copy / "model").is_symlink()


def test_one_at_a_time(copy: Path, small_text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(copy)
    with hold(copy, ""):
        for flags in ([], ["--fresh"]):
            line = refusal(capsys, *command_of(copy, small_text)[1:], *flags)
            assert f"{copy}: another quickstart is running there" in line
    with hold(copy / "checkpoints", ""):  # of a training that something else has started there
        assert "another process is training" in refusal(capsys, *command_of(copy, small_text)[1:], "--fresh")
    assert contents(copy) == before


@pytest.mark.slow
def test_fresh_beside_a_running_quickstart(tmp_path: Path, small_text: Path) -> None:
    folder = tmp_path / "run"
    command = quickstart(folder, "--text", str(small_text))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        _wait_for(lambda: (folder / "quickstart.json").exists())
        done = subprocess.run([*command, "--fresh"], capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert "another quickstart is running there" in done.stderr
        assert running.communicate(timeout=300)[0].count("[6/6]") == 1
        assert running.returncode == 0


def test_prompts(
    copy: Path, small_text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An empty one is one; one that does not fit is refused before anything is trained."""
    monkeypatch.setattr("mobilellm.cli.quickstart.program", lambda: "mobilellm")
    for prompt, shown in (("", "''"), ("it's\nso", "'it'\"'\"'s\nso'"), ("- x", "-- '- x'")):
        assert _main([*command_of(copy, small_text), f"--prompt={prompt}"]) == 0
        printed = capsys.readouterr().out
        assert f"[6/6] it talks:\n\n{prompt}" in printed
        assert f"  mobilellm generate {copy} --temperature 0.7 {shown}\n" in printed
    (copy / "report.json").unlink()
    before = contents(copy)
    line = refusal(capsys, *command_of(copy, small_text)[1:], "--prompt", "word " * 2000)
    assert "--prompt has" in line
    assert contents(copy) == before


@pytest.mark.slow
def test_the_commands_it_prints_can_be_pasted(
    tmp_path: Path, small_text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder with a space and a quote, the user's own text in the prompt."""
    monkeypatch.chdir(tmp_path)
    folder = Path("it's my run")
    assert _main(command_of(folder, small_text)) == 0
    printed = capsys.readouterr().out
    commands = [line for line in printed.partition("Go on:\n")[2].splitlines() if line.startswith("  ")]
    assert len(commands) == 3
    held_out = " ".join(small_text.read_text().split())
    assert shlex.split(commands[0])[-1] in held_out
    page = html.unescape((folder / "report.html").read_text())
    for command in commands:
        assert command.strip() in page
        here = command.replace(installation.program(), f"{sys.executable} -m mobilellm", 1)
        done = subprocess.run(["bash", "-c", here], capture_output=True, text=True, timeout=300, check=False)
        assert (done.returncode, done.stdout != "") == (0, True), command + done.stderr
    assert (tmp_path / "it's my run-llama" / "model.safetensors").is_file()


def test_the_first_ctrl_c_is_acknowledged_at_once_and_the_second_tells_what_is_lost(
    tmp_path: Path, small_text: Path
) -> None:
    folder = tmp_path / "run"
    command = quickstart(folder, "--text", str(small_text), "--steps", "400")
    slow = "import time; from mobilellm.report.progress import TrainingProgress as P; update = P.update"
    slow += "; P.update = lambda *a: (time.sleep(0.3), update(*a))[1]"
    command[1:3] = ["-c", f"{slow}; from mobilellm.cli.main import main; main()"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    _wait_for(lambda: '"step": 2' in _text(folder / "metrics.jsonl"))
    process.send_signal(signal.SIGINT)
    said = b""
    while b"Ctrl-C again" not in said:
        said += os.read(process.stderr.fileno(), 1000)
    assert b"stopping after this step" in said
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 130, errors
    assert errors == b""
    done = (folder / "metrics.jsonl").read_text().count('"loss"') - 1  # one is of the evaluation
    assert f"Steps 1 to {done} are lost, for there was no checkpoint yet" in printed.decode()


def test_what_is_kept(tmp_path: Path) -> None:
    assert what_is_kept(tmp_path) == "The same command starts over."
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "index.json").write_text("{}")
    assert what_is_kept(tmp_path) == "The same command goes on with the training."
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"step": 0, "eval": {}}\n{"step": 1, "loss": 2.0}\n')
    assert what_is_kept(tmp_path).startswith("Step 1 is lost, for there was no checkpoint yet")
    (tmp_path / "checkpoints" / "step-00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000009.tmp-1-a").mkdir()
    assert what_is_kept(tmp_path) == "All 1 steps are kept; the same command goes on from there."
    metrics.write_text(metrics.read_text() + '{"step": 2}\n{"step": 3}\n{"ste')
    assert what_is_kept(tmp_path).startswith("Steps 2 to 3 are lost: the last checkpoint, step 1, is where")


def test_a_reader_that_goes_away_is_not_a_success(tmp_path: Path, small_text: Path) -> None:
    folder = tmp_path / "run"
    command = quickstart(folder, "--text", str(small_text))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        assert running.stdout.readline().startswith("[1/6]")
        running.stdout.close()
        assert running.stderr is not None
        said = running.stderr.read()
        assert running.wait(timeout=300) == 128 + signal.SIGPIPE
    assert "nobody reads the output any more" in said
    assert "same command" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("absent", [["torch"], ["matplotlib"], ["torch", "matplotlib"]], ids="+".join)
def test_what_is_not_installed_is_told_before_the_start(tmp_path: Path, absent: list[str]) -> None:
    script = without(*absent) + "from mobilellm.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "quickstart", "--out", str(tmp_path / "run")],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"mobilellm: error: quickstart needs the {' and '.join(absent)} package")
    assert "[train]" in done.stderr
    assert not (tmp_path / "run").exists()


def refusal(capsys: pytest.CaptureFixture[str], *flags: str) -> str:
    """The one line an error prints."""
    assert _main(["quickstart", *flags]) == 2, flags
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def command_of(folder: Path, text: Path) -> list[str]:
    return ["quickstart", "--out", str(folder), "--steps", str(STEPS), "--text", str(text)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def _wait_for(condition: object, seconds: float = 120) -> None:
    assert callable(condition)
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never got there"
        time.sleep(0.02)


assert os.name == "posix"  # signals as above
