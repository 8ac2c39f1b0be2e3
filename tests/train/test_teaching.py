"""Filling a cache over the text of a run, and training from it: once, resumable, exact, on any number of processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import same_weights, stop_at, timeless, tiny_loader, tiny_model, tiny_settings, tiny_stream
from tiny_teachers import IDENTITY, TinyTeacher

from mobilellm.data.loader import Batch, PackedLoader
from mobilellm.train import teaching
from mobilellm.train.distillation_loss import distillation_loss
from mobilellm.train.distributed import World
from mobilellm.train.loop import train
from mobilellm.train.metrics import Record
from mobilellm.train.teacher import top_k
from mobilellm.train.teacher_cache import CacheError, TeacherCache, open_cache
from mobilellm.train.teaching import TaughtLoader, fill, passages_of

ALONE = World()
SETTINGS = tiny_settings(steps=12, every=4)
"""Over 38 windows, four a step: more than an epoch."""
MIXTURE = {"ce_weight": 0.4, "kl_weight": 0.6}


def filled(directory: Path) -> TeacherCache:
    cache = open_cache(directory, IDENTITY)
    fill(cache, tiny_loader(SETTINGS), SETTINGS.steps, TinyTeacher(), ALONE)
    return cache


def test_the_teacher_runs_once_over_each_passage(tmp_path: Path) -> None:
    cache, loader, teacher, seen = open_cache(tmp_path, IDENTITY), tiny_loader(SETTINGS), TinyTeacher(), []
    loader.next()
    before = loader.state()
    windows = loader.num_windows
    assert fill(cache, loader, 24, teacher, ALONE, lambda *place: seen.append(place)) == windows
    assert loader.state() == before
    assert seen[-1] == (windows, windows)
    assert teacher.tokens <= 16 * windows
    used = teacher.tokens
    assert fill(open_cache(tmp_path, IDENTITY), loader, SETTINGS.steps, teacher, ALONE) == 0
    assert fill(open_cache(tmp_path, None), loader, SETTINGS.steps, None, ALONE) == 0
    assert teacher.tokens == used


def test_more_data_is_added_and_without_the_teacher_refused(tmp_path: Path) -> None:
    cache = filled(tmp_path)
    more = PackedLoader(tiny_stream(900), 16, 4, 5)
    with pytest.raises(CacheError, match=r"lacks 20 passages of this run .* name the teacher"):
        fill(cache, more, 20, None, ALONE)
    assert fill(cache, more, 20, TinyTeacher(), ALONE) == 20


@pytest.mark.parametrize("document_mask", [False, True])
def test_batches_bring_what_the_teacher_says_of_them(tmp_path: Path, document_mask: bool) -> None:
    def loader(rank: int, size: int) -> PackedLoader:
        return PackedLoader(tiny_stream(), 16, 4, 5, rank, size, document_mask=document_mask)

    cache, teacher = open_cache(tmp_path, IDENTITY), TinyTeacher()
    fill(cache, loader(0, 1), 12, teacher, ALONE)
    ranks = [TaughtLoader(loader(rank, 2), cache, MIXTURE) for rank in range(2)]
    for _ in range(12):
        for taught in ranks:
            batch = taught.next()
            assert batch.teacher_ids is not None
            assert batch.teacher_logs is not None
            assert batch.teacher_ids.shape == (*batch.tokens.shape, 8)
            assert batch.teacher_logs.shape == (*batch.tokens.shape, 9)
            found = list(passages_of(batch))
            told = np.zeros(batch.tokens.shape, np.bool_)
            for (row, start, passage), top in zip(
                found, top_k(teacher, [each[2] for each in found], 8, 2.0), strict=True
            ):
                places = start + np.flatnonzero(passage.counted)
                told[row, places] = True
                # The sums of a batch of other passages may round otherwise.
                assert np.allclose(batch.teacher_logs[row, places], top.logs, atol=1e-2)
                assert (batch.teacher_ids[row, places] == top.ids).mean() > 0.99
            assert (told == (batch.weights > 0)).all()
            assert not batch.teacher_logs[~told].any()


def test_documents_are_passages_of_their_own_wherever_they_are_packed() -> None:
    tokens = np.array([[1, 5, 6, 1, 7, 8, 9, 0], [1, 7, 8, 9, 1, 5, 6, 0]])
    segments = np.array([[0, 0, 0, 1, 1, 1, 1, 2], [0, 0, 0, 0, 1, 1, 1, 2]], np.int32)
    weights = np.array([[0, 1, 0, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 1, 0, 0]], np.float32)
    found = list(passages_of(Batch(tokens, tokens, weights, segments)))
    assert [(row, start, passage.tokens.tolist()) for row, start, passage in found] == [
        (0, 0, [1, 5]), (0, 3, [1, 7, 8]), (1, 0, [1, 7, 8]), (1, 4, [1, 5]),
    ]  # fmt: skip
    assert len({passage.key for _, _, passage in found}) == 2


def distilled(
    directory: Path, cache: TeacherCache, mixture: dict[str, float] = MIXTURE, **options: Any
) -> Any:
    model, records = tiny_model(), list[Record]()
    on_record: Callable[[Record], None] = options.pop("on_record", lambda record: None)

    def seen(record: Record) -> None:
        records.append(record)
        on_record(record)

    loader = TaughtLoader(tiny_loader(SETTINGS), cache, mixture)
    loss = distillation_loss(IDENTITY.temperature, **mixture)
    train(model, loader, SETTINGS, directory, loss_function=loss, on_record=seen)
    return model, records


def test_a_stopped_run_goes_on_exactly(tmp_path: Path) -> None:
    cache = filled(tmp_path / "cache")
    whole, records = distilled(tmp_path / "whole", cache)
    distilled(tmp_path / "run", cache, on_record=stop_at(6))
    cache = open_cache(tmp_path / "cache", None)
    resumed, rest = distilled(tmp_path / "run", cache)
    assert same_weights(whole, resumed)
    assert timeless(records)[-len(rest) :] == timeless(rest)
    assert len(rest) < len(records)


def test_a_checkpoint_of_another_mixture_or_of_none_is_refused(tmp_path: Path) -> None:
    cache = filled(tmp_path / "cache")
    distilled(tmp_path / "run", cache)
    with pytest.raises(ValueError, match=r"resume: the run has distill = .*0\.9.* checkpoint .*0\.4"):
        distilled(tmp_path / "run", cache, {"ce_weight": 0.1, "kl_weight": 0.9})
    with pytest.raises(ValueError, match=r"resume: the loader has"):
        train(tiny_model(), tiny_loader(SETTINGS), SETTINGS, tmp_path / "run")
    train(tiny_model(), tiny_loader(SETTINGS), SETTINGS, tmp_path / "plain")
    with pytest.raises(ValueError, match=r"and the checkpoint None; resume with the same teacher"):
        distilled(tmp_path / "plain", cache)


def test_a_damaged_passage_stops_the_run(tmp_path: Path) -> None:
    cache = filled(tmp_path / "cache")
    file = next((tmp_path / "cache").glob("part-*"))
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1  # of the top k, which come last but for the digests
    file.write_bytes(content)
    cache = open_cache(tmp_path / "cache", IDENTITY)
    with pytest.raises(CacheError, match=r"damaged .* delete this file: the teacher then runs again"):
        distilled(tmp_path / "run", cache)
    file.unlink()
    assert (
        fill(open_cache(tmp_path / "cache", IDENTITY), tiny_loader(SETTINGS), 12, TinyTeacher(), ALONE) == 38
    )


def test_a_teacher_that_fails_leaves_what_was_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teaching, "TOKENS_AT_ONCE", 160)

    def interrupt(done: int, of: int) -> None:
        if done > 15:
            raise KeyboardInterrupt

    cache = open_cache(tmp_path, IDENTITY)
    with pytest.raises(KeyboardInterrupt):
        fill(cache, tiny_loader(SETTINGS), 12, TinyTeacher(), ALONE, interrupt)
    left = fill(open_cache(tmp_path, IDENTITY), tiny_loader(SETTINGS), 12, TinyTeacher(), ALONE)
    assert left in (17, 18)


def test_killed_it_goes_on_after_the_last_part(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, __file__, str(tmp_path / "cache")], check=False, timeout=300)
    assert done.returncode == -signal.SIGKILL
    cache = open_cache(tmp_path / "cache", IDENTITY)
    there = len(cache)
    assert there in (20, 21)
    assert fill(cache, tiny_loader(SETTINGS), 12, TinyTeacher(), ALONE) == 38 - there
    assert same_weights(
        distilled(tmp_path / "a", cache)[0], distilled(tmp_path / "b", filled(tmp_path / "whole"))[0]
    )


def test_what_another_run_wrote_meanwhile_is_seen_and_remains_go(tmp_path: Path) -> None:
    early = open_cache(tmp_path, IDENTITY)
    filled(tmp_path)
    (tmp_path / "part-000009.safetensors.tmp-1-ab").write_bytes(b"half")
    teacher = TinyTeacher()
    fill(early, tiny_loader(SETTINGS), 12, teacher, ALONE)
    assert teacher.tokens == 0
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["cache.json", "part-000000.safetensors"]


def test_while_another_run_fills_it_it_is_refused(tmp_path: Path) -> None:
    def meanwhile(done: int, of: int) -> None:
        with pytest.raises(ValueError, match=r"another run fills this cache; wait for it"):
            fill(open_cache(tmp_path, IDENTITY), tiny_loader(SETTINGS), 12, TinyTeacher(), ALONE)

    assert fill(open_cache(tmp_path, IDENTITY), tiny_loader(SETTINGS), 12, TinyTeacher(), ALONE, meanwhile)


@dataclass(frozen=True)
class Together(World):
    """Processes as threads."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def agree(self, problem: str | None) -> None:
        assert problem is None
        self.barrier.wait(timeout=300)


def test_several_processes_share_the_work(tmp_path: Path) -> None:
    barrier, teachers = threading.Barrier(3), [TinyTeacher() for _ in range(3)]

    def work(rank: int) -> None:
        world = Together(rank=rank, size=3, barrier=barrier)
        with torch.inference_mode():
            cache = teaching.open_together(tmp_path, IDENTITY, world)
            assert fill(cache, tiny_loader(SETTINGS), 12, teachers[rank], world) == 38
            assert len(cache) == 38

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=300)
    assert max(each.tokens for each in teachers) <= 13 * 16
    assert len(open_cache(tmp_path, IDENTITY)) == 38


def _killed(directory: Path) -> None:
    """Fill a cache, and be killed after the second part."""
    teaching.TOKENS_AT_ONCE, teaching.PART_BYTES = 160, 1

    def kill(done: int, of: int) -> None:
        if done > 25:
            os.kill(os.getpid(), signal.SIGKILL)

    fill(open_cache(directory, IDENTITY), tiny_loader(SETTINGS), 12, TinyTeacher(), ALONE, kill)


if __name__ == "__main__":
    _killed(Path(sys.argv[1]))
