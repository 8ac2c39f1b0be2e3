"""Contestants in processes of their own: answers, complaints, ends."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from gguf_files import SHAPE, exported, saved

from mobilellm.bench.entries import Entry
from mobilellm.bench.starts import cold_starts
from mobilellm.bench.worker import Worker, WorkerError
from mobilellm.runtime import engine

if (fault := engine.missing()) is not None:
    pytest.skip(f"the native engine was not compiled: {fault}", allow_module_level=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tmp_path_factory.mktemp("worker"), "Q8_0")[0]


def test_it_answers_complains_and_ends(file: Path) -> None:
    with Worker("runtime", file, 2, 40) as worker:
        assert worker.about["n_threads"] == 2
        assert 0 < worker.call("decode", depth=30, tokens=10) < 60
        assert 0 < worker.call("prefill", tokens=40) < 60
        with pytest.raises(WorkerError, match="cannot truncate a cache of 40 tokens to -1"):
            worker.call("decode", depth=-1, tokens=1)
        assert worker.call("prefill", tokens=4) > 0  # it is still there
        process = worker._process
    assert process.poll() is not None


def test_what_cannot_be_made_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"no model" * 10)
    with pytest.raises(WorkerError, match=r"m\.gguf: is no GGUF file") as caught:
        Worker("runtime", tmp_path / "m.gguf", 2, 40)
    assert "\n" not in str(caught.value)


def test_a_process_that_dies_is_noticed(file: Path) -> None:
    with Worker("runtime", file, 1, 40) as worker:
        os.kill(worker._process.pid, 9)
        with pytest.raises(WorkerError, match="the process ended with code -9: it said nothing"):
            worker.call("prefill", tokens=4)


def test_a_cold_start(file: Path) -> None:
    entry = Entry("m", "runtime", file)
    (start,), failures = cold_starts([entry], 90, 1, 2, lambda *turn: None)
    assert not failures
    (seconds,) = start.seconds
    assert 0 < seconds[0] < seconds[1] < seconds[2] < seconds[3] < 60
    assert start.first_token_seconds == seconds[2]
    assert start.load_seconds == seconds[1] - seconds[0]
    assert 10e6 < start.peak_bytes[0] <= start.peak_bytes[1] <= start.peak_bytes[3] < 300e6
    record = start.record()
    assert record["file_bytes"] == file.stat().st_size
    assert record["cache_bytes"] == 90 * 2 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim * 2


def test_starts_that_fail(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"no model" * 10)
    with pytest.raises(ValueError, match=r"mine: .*m\.gguf: is no GGUF file"):
        cold_starts([Entry("mine", "runtime", tmp_path / "m.gguf")], 8, 1, 2, lambda *turn: None)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torch", "transformers"])
def test_pytorch_takes_part(tmp_path: Path, kind: str) -> None:
    model = saved(tmp_path / "model", SHAPE)
    with Worker(kind, tmp_path / "model", 1, 40) as worker:
        about = worker.about
        assert about["model_n_params"] == sum(each.numel() for each in model.parameters())
        assert about["bytes_per_token"] == about["model_size"] == 4 * about["model_n_params"]
        assert (
            about["cache_bytes_per_token"] == 4 * 2 * SHAPE.num_layers * SHAPE.num_kv_heads * SHAPE.head_dim
        )
        for depth in (0, 30, 30, 10):
            assert worker.call("decode", depth=depth, tokens=10) > 0
        assert worker.call("prefill", tokens=40) > 0
    (start,), failures = cold_starts([Entry("m", kind, tmp_path / "model")], 90, 1, 1, lambda *turn: None)
    assert not failures
    assert start.seconds[0][2] > start.seconds[0][1]
