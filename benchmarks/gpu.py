"""What only a GPU can tell: correctness, attention by each way, tokens/s and MFU of all five sizes.

    benchmarks/gpu.sh docs/results/gpu.json
    python benchmarks/gpu.py --device cpu --sizes test --sequences 4 --length 64   # a trial

A step of training is 32 sequences of 2,048 tokens, as one GPU of the official run had; the largest
micro-batch that should fit is tried, then half of it, and the best counts; one that does not fit is said, and
its half is tried. bfloat16 products, fused AdamW, clipping at 1.0, random tokens. MFU counts 6N and causal
attention (accounting.training_flops_per_token) against the dense bf16 peak of the data sheet.
The file is written after every measurement. What does not fit in the budget of seconds is left out, and said;
what fails or hangs costs its own figure only.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import machine

from mobilellm.atomic import atomic_write

SIZES = ("125m", "350m", "600m", "1b", "1.5b")
CHECKS = (
    "as_on_the_cpu", "muon_as_on_the_cpu", "as_transformers", "documents_by_varlen", "documents_by_flex",
    "compiled_as_plain", "resumed_as_uninterrupted", "ddp_as_alone", "fsdp_as_alone",
    "generates_as_on_the_cpu",
)  # fmt: skip
LIMITS = {"card": 60.0, "check": 100.0, "attention": 100.0, "train": 120.0}
"""Seconds of one task of a kind: a hanging compiler must not take all."""
START = 60.0
"""Seconds more for the first task of a process, which imports torch."""
WORKER = Path(__file__).with_name("gpu_worker.py")
Task = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", default=list(SIZES))
    parser.add_argument("--sequences", type=int, default=32, help="of one step")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget", type=float, default=470, help="seconds for everything")
    parser.add_argument("--no-rival", action="store_true")
    parser.add_argument("--only", choices=("checks", "attention", "train"))
    parser.add_argument("--json", type=Path)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no child is left behind
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    report = _Report(arguments)
    deadline = time.monotonic() + arguments.budget
    for tasks in _tasks(arguments):
        _run(tasks, arguments, deadline, report)
        if reason := report.content["card"].get("failed"):
            raise SystemExit(f"gpu: {arguments.device} cannot be used ({reason})")
    report.write(complete=True)
    print(json.dumps(report.content, indent=2))
    report.print_summary()


def _tasks(arguments: argparse.Namespace) -> list[list[Task]]:
    """What to do, the most telling first; each list in a process of its own."""
    sizes, only = arguments.sizes, arguments.only
    checks = [{"kind": "check", "name": name} for name in CHECKS]
    attention = [{"kind": "attention", "size": size} for size in sizes if size in ("125m", "1b", "test")]
    systems = ("ours",) if arguments.no_rival else ("ours", "trainer")
    train = [_train(size, system) for system in systems for size in sizes]
    ways = ("varlen", "flex", "dense") if arguments.device != "cpu" else ("dense",)
    others = [_train(sizes[0], documents=way) for way in ways]
    others += [_train(sizes[0], compile=False), _train(sizes[0], checkpointing=True)]
    halves = [_train(size, system, half=True) for system in systems for size in sizes]
    parts = (
        ("checks", checks), ("train", train), ("attention", attention), ("train", others), ("train", halves)
    )  # fmt: skip
    wanted = [tasks for name, tasks in parts if only in (None, name)]
    return [[{"kind": "card"}, *wanted[0]], *wanted[1:]]


def _train(size: str, system: str = "ours", **options: Any) -> Task:
    """`half`: of the largest micro-batch; `documents`: by which way they are kept apart; see `training`."""
    return {"kind": "train", "system": system, "size": size} | options


def _run(tasks: list[Task], arguments: argparse.Namespace, deadline: float, report: _Report) -> None:
    """All tasks, in as few processes as crashes and hangs allow."""
    while tasks and "failed" not in report.content["card"]:
        if deadline - time.monotonic() < 20:
            for task in tasks:
                report.add(task, {"left_out": "the budget of seconds was spent"})
            return
        with _Child(tasks, arguments) as child:
            first = True
            while tasks and "failed" not in report.content["card"]:
                limit = LIMITS[tasks[0]["kind"]] + (START if first else 0)
                left = deadline - time.monotonic()
                result = child.result(min(limit, left))
                if result is None:  # it died, or hangs
                    spent = "the budget of seconds was spent" if limit > left else f"none after {limit:.0f} s"
                    result = {"failed": child.last_words()} if child.is_dead() else {"left_out": spent}
                    report.add(tasks.pop(0), result)
                    break
                report.add(tasks.pop(0), result)
                first = False


class _Child:
    """A process that works through tasks and prints a line of JSON after each."""

    def __init__(self, tasks: list[Task], arguments: argparse.Namespace) -> None:
        common = {"device": arguments.device, "sequences": arguments.sequences, "length": arguments.length}
        # Deterministic algorithms of cuBLAS need this before there is a context; only checks ask for them.
        asks = any(task["kind"] == "check" for task in tasks)
        checking = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if asks else {}
        self._words = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps({"tasks": tasks, **common})],
            stdout=subprocess.PIPE, stderr=self._words, text=True, env=os.environ | checking,
            start_new_session=True,
        )  # fmt: skip
        self._lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # compilers that it started, too
        self._process.wait()
        self._words.close()

    def result(self, seconds: float) -> dict[str, Any] | None:
        try:
            line = self._lines.get(timeout=max(0.0, seconds))
        except queue.Empty:
            return None
        return None if line is None else json.loads(line)

    def is_dead(self) -> bool:
        try:
            self._process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return False
        return True

    def last_words(self) -> str:
        """How it ended: what faulthandler says of a crash, else the last line."""
        self._words.seek(0)
        lines = self._words.read().strip().splitlines()
        line = next((each for each in lines if each.startswith("Fatal Python error")), "".join(lines[-1:]))
        code = self._process.returncode
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{how}: {line[:300] or 'no reason given'}"

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)


class _Report:
    """What is known so far, in the file after every addition."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._path: Path | None = arguments.json
        self._started = time.monotonic()
        self.content: dict[str, Any] = {
            "machine": machine.describe(), "card": {}, "sequences": arguments.sequences,
            "length": arguments.length, "complete": False, "seconds": 0.0, "checks": {}, "attention": {},
            "sizes": {}, "variants": [],
        }  # fmt: skip

    def add(self, task: Task, result: dict[str, Any]) -> None:
        content, kind = self.content, task["kind"]
        described = {name: value for name, value in task.items() if name != "kind"}
        if kind == "card":
            content["card"] = result
        elif kind == "check":
            content["checks"][task["name"]] = result
        elif kind == "attention":
            content["attention"][task["size"]] = result
        elif described.keys() <= {"system", "size", "half"}:
            entry = content["sizes"].setdefault(task["size"], {"ours": [], "trainer": []})
            entry[task["system"]].append(result)
            _compare(entry)
        else:
            content["variants"].append(described | result)
        words = json.dumps(result)
        print(f"{' '.join(map(str, task.values()))}: {words[:400]}", file=sys.stderr, flush=True)
        self.write()

    def write(self, complete: bool = False) -> None:
        self.content |= {"complete": complete, "seconds": round(time.monotonic() - self._started, 1)}
        if self._path is not None:
            with atomic_write(self._path) as beside:
                beside.write_text(json.dumps(self.content, indent=2) + "\n", encoding="utf-8")

    def print_summary(self) -> None:
        checks = self.content["checks"]
        done = {name: result for name, result in checks.items() if "left_out" not in result}
        failed = [name for name, result in done.items() if not result.get("passed")]
        print(
            f"checks: {len(done) - len(failed)} passed, {len(checks) - len(done)} left out,",
            f"{len(failed)} failed: {', '.join(failed)}" if failed else "none failed",
            file=sys.stderr,
        )
        for size, entry in self.content["sizes"].items():
            best = {system: _best(entry[system]) for system in ("ours", "trainer")}
            ratio = entry.get("ratio_of_speed", "-")
            print(f"{size}: ours {best['ours']} trainer {best['trainer']} ratio {ratio}", file=sys.stderr)


def _compare(entry: dict[str, Any]) -> None:
    best = {system: _best(entry[system]) for system in ("ours", "trainer")}
    if all(best.values()):
        entry["ratio_of_speed"] = round(best["ours"] / best["trainer"], 2)


def _best(runs: list[dict[str, Any]]) -> float:
    return max((run["tokens_per_second"] for run in runs if "tokens_per_second" in run), default=0)


if __name__ == "__main__":
    main()
