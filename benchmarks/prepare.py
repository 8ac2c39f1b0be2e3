"""`mobilellm prepare` from packed file to shards against the bare tokenizer's encode rate, and its memory.

    python benchmarks/prepare.py DATA.jsonl… --json docs/results/prepare.json

The rival is `encode_batch_fast` of the tokenizers library on the same documents, already in memory, with all
its threads, nothing else done with the ids: no reading, no hashing, no writing. Ours is the whole command, in
a process of its own, start-up included. The two take turns; the ratio is of the
medians, and the ids are compared.
Peak memory is that of the command and all its processes together, at two corpus sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np

from mobilellm.data.chunks import START
from mobilellm.data.inputs import find_sources
from mobilellm.data.prepare_settings import PrepareSettings
from mobilellm.data.readers import chunks_of
from mobilellm.data.records import records_of
from mobilellm.data.shards import read_split
from mobilellm.tokenizer import BOS_ID, EOS_ID, Tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", nargs="+")
    parser.add_argument("--tokenizer", type=Path, help="by default one of 16,384 pieces is trained")
    parser.add_argument("--megabytes", type=float, default=20.0, help="text for the comparison of speeds")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--memory-megabytes", type=float, nargs=2, default=(50.0, 500.0))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = _tokenizer(arguments, folder)
        speed = _speed(arguments, folder, tokenizer)
        memory = _memory(arguments, folder)
    machine.write(arguments.json, {"workers": arguments.workers, "speed": speed, "memory": memory})


def _tokenizer(arguments: argparse.Namespace, folder: Path) -> Tokenizer:
    if arguments.tokenizer:
        tokenizer = Tokenizer.load(arguments.tokenizer)
    else:
        _say("training a tokenizer of 16,384 pieces on 20 MB")
        out = folder / "trained"
        command = [sys.executable, "-m", "mobilellm", "tokenizer", "train", *arguments.data]
        flags = ["--vocab-size", "16384", "--sample-megabytes", "20", "--out", str(out), "--json"]
        subprocess.run([*command, *flags], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        tokenizer = Tokenizer.load(out)
    tokenizer.save(folder / "tokenizer")
    return tokenizer


def _speed(arguments: argparse.Namespace, folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    texts = []
    size = 0
    for text in _texts(arguments.data):
        if size >= arguments.megabytes * 1e6:
            break
        texts.append(text)
        size += len(text.encode())
    file = folder / "speed.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    _say(f"{len(texts):,} documents, {size / 1e6:.1f} MB; {arguments.runs} runs of each, taking turns")
    bare = tokenizer._backend
    seconds: dict[str, list[float]] = {"bare": [], "prepare": []}
    for run in range(arguments.runs):
        started = time.perf_counter()
        encodings = bare.encode_batch_fast(texts, add_special_tokens=False)
        seconds["bare"].append(time.perf_counter() - started)
        if run == 0:
            expected = [np.array([BOS_ID, *encoding.ids, EOS_ID]) for encoding in encodings]
        del encodings
        started = time.perf_counter()
        _prepare(file, folder, arguments.workers)
        seconds["prepare"].append(time.perf_counter() - started)
        if run == 0:
            _compare(folder / "out", expected)
            del expected
        last = {name: size / 1e6 / times[-1] for name, times in seconds.items()}
        _say(f"  bare {last['bare']:.2f} MB/s, prepare {last['prepare']:.2f}")
    rates = {name: size / 1e6 / statistics.median(times) for name, times in seconds.items()}
    ratios = [b / p for b, p in zip(seconds["bare"], seconds["prepare"], strict=True)]
    return {
        "documents": len(texts),
        "megabytes": round(size / 1e6, 1),
        "vocabulary": tokenizer.vocab_size,
        "megabytes_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "ratio": round(rates["prepare"] / rates["bare"], 2),
        "ratio_lowest_run": round(min(ratios), 2),
        "ids_equal": True,  # or _compare would have stopped
    }


def _compare(out: Path, expected: list[np.ndarray[Any, Any]]) -> None:
    """Every document the bare tokenizer encoded is in the shards, id for id, in order."""
    sides = {split: read_split(out, split) for split in ("train", "held-out")}
    at = dict.fromkeys(sides, 0)
    kept: set[bytes] = set()
    for ids in expected:
        if ids.tobytes() in kept:
            continue  # an exact duplicate
        kept.add(ids.tobytes())
        for split, stream in sides.items():
            if np.array_equal(stream[at[split] : at[split] + len(ids)], ids):
                at[split] += len(ids)
                break
        else:
            raise AssertionError("prepare and the tokenizers library give different ids")
    assert all(at[split] == len(stream) for split, stream in sides.items())


def _memory(arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The data over and over again, every copy of a document made different so that none is a duplicate."""
    results = []
    for megabytes in arguments.memory_megabytes:
        file = folder / "memory.jsonl"
        size = 0
        with file.open("w", encoding="utf-8") as stream:
            copy = 0
            while size < megabytes * 1e6:
                for number, text in enumerate(_texts(arguments.data)):
                    line = json.dumps({"text": f"{copy} {number}\n{text}"}) + "\n"
                    stream.write(line)
                    size += len(line)
                    if size >= megabytes * 1e6:
                        break
                copy += 1
        started = time.perf_counter()
        peak = _prepare(file, folder, arguments.workers)
        seconds = time.perf_counter() - started
        results.append(
            {
                "megabytes": round(size / 1e6, 1),
                "peak_megabytes": round(peak / 1e6, 1),
                "megabytes_per_second": round(size / 1e6 / seconds, 2),
            }
        )
        _say(f"  {results[-1]}")
    return results


def _prepare(file: Path, folder: Path, workers: int) -> int:
    """Run the command; the peak of the memory that it and its workers hold at the same time, in bytes."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    command = [
        sys.executable,
        "-m",
        "mobilellm",
        "prepare",
        str(file),
        "--tokenizer",
        str(folder / "tokenizer"),
    ]
    command += ["--out", str(folder / "out"), "--workers", str(workers), "--json"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        peak, done = [0], threading.Event()
        watch = threading.Thread(target=_watch, args=(process.pid, peak, done))
        watch.start()
        code = process.wait()
        done.set()
        watch.join()
    if code:
        raise SystemExit(f"prepare failed with {code}")
    return peak[0]


def _watch(process: int, peak: list[int], done: threading.Event) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    while not done.wait(0.25):
        resident = 0
        for member in [process, *_children(process)]:
            try:
                resident += int(Path(f"/proc/{member}/statm").read_text().split()[1]) * page
            except OSError:
                continue
        peak[0] = max(peak[0], resident)


def _children(process: int) -> list[int]:
    try:
        tasks = Path(f"/proc/{process}/task").iterdir()
        return [int(word) for task in tasks for word in (task / "children").read_text().split()]
    except OSError:
        return []


def _texts(data: list[str]) -> Iterator[str]:
    settings = PrepareSettings()
    for number, source in enumerate(find_sources(data).read):
        for chunk in chunks_of(source, START._replace(source=number), settings):
            for _, text, problem in records_of(chunk, settings.text_field, settings.cutting, {}):
                if not problem and text.strip():
                    yield text


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
