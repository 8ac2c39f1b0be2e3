"""Rules of the whole tree: which way imports run, what stays out of a light start, what no file may hold."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import mobilellm

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src"

FLOORS = {
    1: {
        "config", "layouts", "presets", "accounting", "hardware",
        "tokenizer", "tokenizer_files", "tokenizer_merges", "tokenizer_training", "sentencepiece_model",
        "short_text", "texts",
        "chat_template", "text_stream", "call_syntax", "tool_calls", "completion", "sampling",
        "gguf", "gguf_blocks", "gguf_model", "gguf_tokenizer",
        "model_directory", "hub", "hub_connection", "licence", "git_lfs",
        "atomic", "bytes_on_disk", "compiled", "compiling", "environment", "installation", "user_cache",
    },
    2: {"model", "hf", "data", "runtime", "artefacts"},
    3: {"train", "eval", "quant", "bench"},
    4: {"export", "serve", "report", "chat"},
    5: {"cli", "__main__"},
}  # fmt: skip
STRANGERS = {("data", "model"), ("data", "hf"), ("train", "eval"), ("eval", "train")}
"""Rooms that must not know each other, though their floors would let them: (importer, imported)."""
WITHOUT_TORCH = FLOORS[1] | {"data", "runtime"}
HEAVY = {"torch", "transformers"}
FLOOR_1_PACKAGES = {"numpy", "tokenizers", "gguf", "jinja2", "huggingface_hub"}


# The imports of the package


def floor_of(room: str) -> int | None:
    return next((floor for floor, rooms in FLOORS.items() if room in rooms), None)


def imported_names(source: str, module: str, is_package: bool = False) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import in a module, nested ones too; those for type checkers are exempt.

    `from a import b` gives a.b. Modules that `import_module` or `__import__` name in the text count as well.
    """
    pending: list[ast.AST] = [ast.parse(source)]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            pending += node.orelse
            continue
        pending += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if is_package else module.split(".")[:-1]
                package = package[: len(package) - (node.level - 1)]
                base = ".".join([*package, *filter(None, [node.module])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in ("import_module", "__import__") and (name := _leading_text(node.args[0])):
                yield node.lineno, name


def _leading_text(node: ast.expr) -> str | None:
    """The text an expression is sure to begin with: a constant, or the head of an f-string."""
    if isinstance(node, ast.JoinedStr) and node.values:
        return _leading_text(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What is wrong with the imports of one module of the package, one line each."""
    parts = module.split(".")
    if len(parts) == 1:
        room, floor = "mobilellm", 0  # the package's own __init__: nothing but the standard library at import
    else:
        room = parts[1]
        known = floor_of(room)
        if known is None:
            return [f"{module}: {room!r} stands on no floor; add it to FLOORS in tests/test_house.py"]
        floor = known
    problems = []
    for line, name in sorted(imported_names(source, module, is_package)):
        where = f"{module}, line {line}: "
        outside = name.split(".")[0]
        if outside == "mobilellm":
            problems += [where + problem for problem in _inside_problems(room, floor, name)]
        elif room in WITHOUT_TORCH and outside in HEAVY:
            problems.append(f"{where}{room} must work without {outside}")
        elif floor <= 1 and outside not in FLOOR_1_PACKAGES | sys.stdlib_module_names:
            problems.append(f"{where}floor 1 may import {sorted(FLOOR_1_PACKAGES)}, not {outside}")
    return problems


def _inside_problems(room: str, floor: int, name: str) -> list[str]:
    public_homes = {f"mobilellm.{public}": home for public, home in mobilellm._HOME.items()}
    name = public_homes.get(name, name)
    if name == "mobilellm.__version__":
        return []
    if name in ("mobilellm", "mobilellm.", "mobilellm.*"):  # only the top floor may use any public name
        return (
            []
            if floor == max(FLOORS)
            else [f"{name!r} hides what is used; import from the module that defines it"]
        )
    other = name.split(".")[1]
    above = floor_of(other)
    if above is None:
        return [f"{other!r} stands on no floor; add it to FLOORS in tests/test_house.py"]
    if above > floor:
        return [f"{room} (floor {floor}) must not import {other} (floor {above}): imports run down only"]
    return [f"{room} must not know {other}"] if (room, other) in STRANGERS else []


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((SOURCE / "mobilellm").rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_imports_run_down_the_floors() -> None:
    found = [
        problem
        for module, path in modules()
        for problem in violations(path.read_text("utf-8"), module, path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_the_walk_reaches_the_whole_package() -> None:
    seen = dict(modules())
    assert {"mobilellm", "mobilellm.config", "mobilellm.model.transformer", "mobilellm.cli.main"} <= set(seen)
    names = {name for _, name in imported_names(seen["mobilellm.model.transformer"].read_text("utf-8"), "x")}
    assert {"torch", "mobilellm.config.ModelConfig", "mobilellm.model.cache.KVCache"} <= names


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("mobilellm.config", "import torch", "config must work without torch"),
        ("mobilellm.config", "import rich", "floor 1 may import"),
        ("mobilellm", "import numpy.linalg, safetensors", "not safetensors"),
        ("mobilellm.config", "from mobilellm.model.cache import KVCache", "(floor 1) must not import model"),
        ("mobilellm.config", "def f():\n  from mobilellm.model import cache", "line 2: config (floor 1)"),
        ("mobilellm.config", "from mobilellm import load", "must not import model (floor 2)"),
        ("mobilellm.config", "from mobilellm import train", "must not import train (floor 3)"),
        ("mobilellm.model.api", "import mobilellm", "hides what is used"),
        ("mobilellm.model.api", "from mobilellm import *", "hides what is used"),
        ("mobilellm.model.api", "from .. import train", "must not import train"),
        ("mobilellm.model.api", "from ..train.loop import train", "must not import train"),
        ("mobilellm.model", "from ..train.loop import train", "must not import train"),
        ("mobilellm.model.api", "import_module('mobilellm.cli.main')", "must not import cli"),
        ("mobilellm.model.api", "importlib.import_module(f'mobilellm.cli.{verb}')", "must not import cli"),
        ("mobilellm.data.loader", "from mobilellm.model.api import load", "data must not know model"),
        ("mobilellm.train.loop", "from mobilellm.eval.perplexity import x", "train must not know eval"),
        ("mobilellm.eval.perplexity", "import mobilellm.train.loop", "eval must not know train"),
        ("mobilellm.runtime.engine", "try:\n  import torch.nn\nexcept ImportError: pass", "without torch"),
        ("mobilellm.runtime.engine", "from transformers import AutoConfig", "without transformers"),
        ("mobilellm.quant.ptq", "from mobilellm.export.verify import x", "must not import export"),
        ("mobilellm.model.api", "from mobilellm.surprise import x", "'surprise' stands on no floor; add it"),
        ("mobilellm.surprise.box", "", "'surprise' stands on no floor; add it"),
        ("mobilellm.config", "if not TYPE_CHECKING:\n  import torch", "without torch"),
        ("mobilellm.config", "if TYPE_CHECKING:\n  import a\nelse:\n  import torch", "without torch"),
    ],
)
def test_the_checker_refuses(module: str, source: str, complaint: str) -> None:
    (problem,) = violations(source, module, is_package=module in ("mobilellm", "mobilellm.model"))
    assert complaint in problem


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mobilellm.config", "import json, numpy\nfrom tokenizers import models"),
        ("mobilellm.config", "if TYPE_CHECKING:\n  import torch\n  from mobilellm.train import loop"),
        (
            "mobilellm.model.api",
            "import torch\nfrom mobilellm.config import ModelConfig\nfrom . import cache",
        ),
        ("mobilellm.hf.modeling", "from .configuration import X\nfrom mobilellm.model.api import load"),
        ("mobilellm.train.loop", "from mobilellm import ModelConfig, __version__"),
        ("mobilellm.export.verify", "from mobilellm.runtime import engine\nfrom mobilellm.quant import ptq"),
        ("mobilellm.cli.main", "import_module(f'mobilellm.cli.{verb}')\nimport_module(name)"),
        ("mobilellm.cli.generate", "import mobilellm\nimport torch"),
    ],
)
def test_the_checker_allows(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_the_command_line_s_own_files_are_explained() -> None:
    """Each is a verb's, begins with a verb's name, or stands in the docstring of the room."""
    from mobilellm import cli
    from mobilellm.cli.main import VERBS

    files = {path.stem for module, path in modules() if module.startswith("mobilellm.cli.")}
    told = set(re.findall(r"(\w+)\.py", cli.__doc__ or ""))
    assert not {name for name in files if name.split("_")[0] not in VERBS} - told
    assert told <= files


# A light start


def loaded_after(code: str) -> set[str]:
    """Top-level packages a fresh process has loaded once `code` has run."""
    report = "import json, sys; sys.stderr.write(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=300, check=True
    )
    return set(json.loads(done.stderr))


@pytest.mark.parametrize(
    "code",
    [
        "import mobilellm",
        "\n".join(
            f"import {name}" for name, _ in modules() if name.count(".") == 1 and name[10:] in FLOORS[1]
        ),
        "from mobilellm.cli.main import _main; assert _main(['--help']) == 0",
        "from mobilellm.cli.main import _main; assert _main(['info', '125m']) == 0",
        "from mobilellm.cli.main import _main; assert _main(['cost', '125m']) == 0",
    ],
    ids=["import", "floor 1", "help", "info", "cost"],
)
def test_starts_without_torch(code: str) -> None:
    assert not loaded_after(code) & HEAVY


def test_torch_would_be_noticed() -> None:
    assert "torch" in loaded_after("import mobilellm.model.transformer")


def test_help_answers_at_once() -> None:
    command = [sys.executable, "-c", "from mobilellm.cli.main import main; main(['--help'])"]
    seconds = []  # of processor time: the machine may be busy with other things
    for _ in range(5):
        before = os.times()
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
        after = os.times()
        seconds.append(
            after.children_user + after.children_system - before.children_user - before.children_system
        )
    assert "usage: mobilellm" in done.stdout
    assert min(seconds) < 0.3, seconds


# What no file of the repository holds

MACHINE_PATH = re.compile(rb"(?<![\w.~-])/(?:" + b"|".join((b"work/", b"root/", b"tmp/" + b"dev")) + rb")")
INSTALL_SOURCE = re.compile(r"(?:index[-_]url|find[-_]links)\W+(\S+)", re.IGNORECASE)
PUBLIC_HOSTS = {"pypi.org", "files.pythonhosted.org", "download.pytorch.org", "localhost", "127.0.0.1"}


def repository_files() -> list[Path]:
    """Tracked files and new ones that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git checkout to tell which files belong to the repository")
    files = [ROOT / os.fsdecode(name) for name in listed.split(b"\0") if name]
    return [file for file in files if file.is_file()]


def unpublic_hosts(text: str) -> list[str]:
    """Hosts of package indexes named in `text` that only some machines can reach."""
    named = [urlsplit(source.strip("\"'`,;)")) for source in INSTALL_SOURCE.findall(text)]
    return [url.hostname for url in named if url.hostname and url.hostname not in PUBLIC_HOSTS]


def this_machines_package_hosts() -> set[str]:
    """Hosts that pip and uv are set up to use here, the public ones left out."""
    settings = [value for name, value in os.environ.items() if name.startswith(("PIP_", "UV_"))]
    pip = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    words = " ".join([*settings, pip.stdout]).replace("'", " ").split()
    hosts = {urlsplit(word[word.find("http") :]).hostname for word in words if "://" in word}
    return {host for host in hosts if host} - PUBLIC_HOSTS


def test_no_file_names_this_machine() -> None:
    files = repository_files()
    assert len(files) > 10
    hosts = {host.encode() for host in this_machines_package_hosts()}
    found = []
    for file in files:
        content = file.read_bytes()
        found += [f"{file.relative_to(ROOT)}: {match[0]!r}" for match in MACHINE_PATH.finditer(content)]
        found += [
            f"{file.relative_to(ROOT)}: a package host of this machine" for host in hosts if host in content
        ]
        if file != Path(__file__):  # which holds samples below
            found += [
                f"{file.relative_to(ROOT)}: {host}"
                for host in unpublic_hosts(content.decode("utf-8", "replace"))
            ]
    assert not found, "\n".join(found)


def test_machine_paths_and_hosts_would_be_noticed() -> None:
    for name in ("work/main", "root/x", "tmp/" + "dev"):
        for before in ("", " ", '"', "file://", "="):
            assert MACHINE_PATH.search(f"{before}/{name}".encode())
    for harmless in ("~/work/", "src/root/", "https://example.org/work/", "/tmp/x", "/rooted", "network/"):
        assert not MACHINE_PATH.search(harmless.encode())
    assert unpublic_hosts("pip install --index-url https://pip.example.net/simple x") == ["pip.example.net"]
    assert unpublic_hosts("find_links = 'http://wheels.example.net:8080'") == ["wheels.example.net"]
    assert unpublic_hosts("--extra-index-url https://download.pytorch.org/whl/cpu, then") == []


def test_first_token_needs_no_compiler(tmp_path: Path) -> None:
    """Loading and generating must not make torch import its compiler or sympy: two seconds of start-up."""
    script = f"""
import sys, torch
from mobilellm import MobileLLM
from mobilellm.model import checkpoint
from mobilellm.model.generate import generate_tokens
from mobilellm.presets import preset
checkpoint.save({str(tmp_path / "model")!r}, MobileLLM(preset("test-ls")), None)
model = checkpoint.build(checkpoint.read_weights({str(tmp_path / "model")!r}))
assert len(list(generate_tokens(model, [[1, 5]], max_new_tokens=3))) <= 3
print([name for name in ("torch._dynamo", "sympy", "transformers") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr
