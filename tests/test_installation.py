"""What a person is told to type works as typed."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from importlib.metadata import Distribution
from pathlib import Path

import pytest

from absent_packages import without
from mobilellm import installation

ROOT = Path(__file__).parents[1]


def test_from_a_checkout_the_pinned_versions_are_installed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    assert installation.install_command("train").endswith(' -m pip install -c constraints.txt -e ".[train]"')
    monkeypatch.chdir(tmp_path)
    words = shlex.split(installation.install_command("hf"))
    assert words[1:4] == ["-m", "pip", "install"]
    assert words[4:] == ["-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[hf]"]
    assert Path(words[0]).samefile(sys.executable)


@pytest.fixture
def as_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The package in site-packages, beside what pip writes down of where it came from."""
    packages = tmp_path / "lib" / "site-packages"
    record = packages / "mobilellm-0.1.0.dist-info"
    record.mkdir(parents=True)
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: mobilellm\nVersion: 0.1.0\n")
    monkeypatch.setattr(installation, "__file__", str(packages / "mobilellm" / "installation.py"))
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: Distribution.at(record))
    return record / "direct_url.json"


@pytest.mark.usefixtures("as_installed")
def test_an_installed_package_comes_from_the_index() -> None:
    assert installation.install_command("train").endswith(' -m pip install "mobilellm[train]"')


def test_what_came_from_elsewhere_is_not_asked_of_the_index(
    as_installed: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Another project might have the name there."""
    source = tmp_path / "my source"
    source.mkdir()
    for name in ("constraints.txt", "pyproject.toml"):
        (source / name).touch()
    as_installed.write_text(json.dumps({"url": source.as_uri(), "dir_info": {}}))
    words = shlex.split(installation.install_command("hf"))
    assert words[4:] == ["-c", str(source / "constraints.txt"), f"{source}[hf]"]
    monkeypatch.chdir(source)
    assert installation.install_command("hf").endswith(' install -c constraints.txt ".[hf]"')

    wheel = tmp_path / "mobilellm-0.1.0-py3-none-any.whl"
    wheel.touch()
    as_installed.write_text(json.dumps({"url": wheel.as_uri(), "archive_info": {}}))
    assert shlex.split(installation.install_command("hf"))[4:] == [f"mobilellm[hf] @ {wheel.as_uri()}"]
    wheel.unlink()
    assert shlex.split(installation.install_command("hf"))[4:] == ["mobilellm[hf]"]

    repository = {"url": "https://git.invalid/m.git", "vcs_info": {"vcs": "git", "commit_id": "abc"}}
    as_installed.write_text(json.dumps(repository))
    words = shlex.split(installation.install_command("hf"))
    assert words[4:] == ["mobilellm[hf] @ git+https://git.invalid/m.git@abc"]


def test_what_a_verb_needs_and_a_package_that_it_does_not_bring() -> None:
    assert installation.extras_with("peft", None) == "finetune"
    assert installation.extras_with("torch", "export") == "export"
    assert installation.extras_with("peft", "train") == "train,finetune"
    assert installation.extras_with("matplotlib", "export") == "export,plots"


@pytest.mark.parametrize("extra", list(installation._BROUGHT))
def test_what_extras_bring_is_what_the_project_says(extra: str) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    found, todo = set[str](), [extra]
    while todo:
        for wanted in extras[todo.pop()]:
            if own := re.match(r"mobilellm\[(.*)\]", wanted):
                todo += own[1].split(",")
            else:
                found.add(re.split("[<>=!~]", wanted)[0].replace("-", "_"))
    assert installation._BROUGHT[extra] == found & installation.EXTRAS.keys()


def an_environment(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    binaries = folder / "my project" / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for name in ("python", "mobilellm", "activate"):
        (binaries / name).write_text("#!/bin/sh\n")
        (binaries / name).chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(binaries / "python"))
    return binaries


def test_the_command_as_the_shell_finds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    binaries = an_environment(tmp_path, monkeypatch)
    monkeypatch.chdir(binaries.parents[1])
    monkeypatch.setenv("PATH", "/usr/bin")
    assert installation.program() == ".venv/bin/mobilellm"
    assert installation.activation() == "source .venv/bin/activate"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert shlex.split(installation.program()) == [str(binaries / "mobilellm")]
    assert installation.program().startswith("'")  # for the space
    monkeypatch.setenv("PATH", f"{binaries}:/usr/bin")
    assert installation.program() == "mobilellm"
    assert installation.activation() is None


def test_another_installation_on_the_path_is_not_this_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = an_environment(tmp_path / "other", monkeypatch)
    binaries = an_environment(tmp_path / "this", monkeypatch)
    monkeypatch.setenv("PATH", f"{other}:/usr/bin")
    assert shlex.split(installation.program()) == [str(binaries / "mobilellm")]
    (binaries / "mobilellm").unlink()
    assert shlex.split(installation.program()) == [str(binaries / "python"), "-m", "mobilellm"]


@pytest.mark.parametrize(
    ("statement", "absent", "said"),
    [
        ("import mobilellm.hf", ["transformers"], "mobilellm.hf needs transformers; install with: "),
        ("import mobilellm.hf", ["torch", "transformers"], "mobilellm.hf needs torch and transformers; "),
        ("from mobilellm import load", ["torch"], "mobilellm.model needs torch; install with: "),
        ("import mobilellm; mobilellm.MobileLLM", ["torch"], "mobilellm.model needs torch; "),
    ],
)
def test_imports_without_what_they_need(statement: str, absent: list[str], said: str) -> None:
    script = f"{without(*absent)}\ntry:\n    {statement}\nexcept ImportError as error:\n    print(error)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=False, cwd=ROOT
    )
    assert done.stderr == ""
    assert done.stdout.startswith(said)
    assert done.stdout.count("\n") == 1
    assert f".[{'hf' if 'hf' in statement else 'torch'}]" in done.stdout
