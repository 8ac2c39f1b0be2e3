"""Several processes give what one gives, by DDP and by FSDP2, and take over from each other."""

from __future__ import annotations

import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spread_runs import CONFIGS, OTHERWISE, TARGETS, launch, spread_run, stopping_at

from mobilellm.train.checkpoint_files import checkpoints
from mobilellm.train.distributed import (
    ToldByAnother,
    World,
    _instead,
    gathers_in_half,
    join,
    part_of_this_start,
)
from mobilellm.train.settings import ComputeSettings

SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in (2, 4)]
ALONE = World()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process, one device."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("alone")
    seen = {config: spread_run(folder / config, ALONE, config) for config in CONFIGS}
    seen |= {name: spread_run(folder / name, ALONE, **changes) for name, changes in OTHERWISE.items()}
    return seen | {f"{config} weights": torch.load(folder / config / "weights.pt") for config in CONFIGS}


@pytest.fixture(scope="module", params=SIZES)
def together(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[dict[str, Any]]]:
    """The folder, and what every process saw."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(f"of-{request.param}")
    for name in ("1 to many", "1 to fsdp"):
        assert spread_run(folder / name, ALONE, loss_function=stopping_at(2))["steps"] == 2
    return folder, launch(request.param, folder)


def same_losses(seen: dict[str, Any], alone: dict[str, Any], steps: slice = slice(None)) -> None:
    assert len(alone["loss"][steps]) > 0
    assert seen["loss"] == pytest.approx(alone["loss"][steps], rel=1e-5)
    assert seen["norm"] == pytest.approx(alone["norm"][steps], rel=1e-4)


def same_weights(folder: Path, alone: dict[str, torch.Tensor]) -> None:
    weights = torch.load(folder / "weights.pt")
    assert weights.keys() == alone.keys()
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_it_is_the_same_run(
    together: tuple[Path, list[dict[str, Any]]], alone: dict[str, Any], strategy: str, config: str
) -> None:
    """Losses, gradient norms, evaluations and texts, with accumulation and unequal weights; tied or not."""
    folder, everywhere = together
    first, *others = (seen[f"{strategy} {config}"] for seen in everywhere)
    same_losses(first, alone[config])
    assert len(first["eval"]) == 4
    assert first["evaluated"] == [TARGETS] * 4  # every target once
    assert first["eval"] == pytest.approx(alone[config]["eval"], rel=1e-5)
    assert first["said"] == pytest.approx(alone[config]["said"], rel=1e-5)
    same_weights(folder / f"{strategy} {config}", alone[f"{config} weights"])
    for other in others:
        assert (other["steps"], other["stopped"]) == (6, None)
        assert other["loss"] == other["said"] == []  # only the first speaks


@pytest.mark.parametrize("name", OTHERWISE)
def test_other_arithmetic(
    together: tuple[Path, list[dict[str, Any]]], alone: dict[str, Any], name: str
) -> None:
    _, everywhere = together
    assert everywhere[0][name]["loss"] == pytest.approx(alone[name]["loss"], rel=1e-3)
    assert everywhere[0][name]["norm"] == pytest.approx(alone[name]["norm"], rel=2e-2)
    assert alone[name]["loss"] != alone["shared"]["loss"]


def test_sharded_means_that_each_holds_a_part(
    together: tuple[Path, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    _, everywhere = together
    for config in CONFIGS:
        whole, parts = (
            alone[config]["parameters"],
            [seen[f"fsdp {config}"]["parameters"] for seen in everywhere],
        )
        assert sum(parts) == whole
        assert max(parts) < 1.2 * whole / len(parts)
        assert {seen[f"ddp {config}"]["parameters"] for seen in everywhere} == {whole}


def test_one_is_asked_and_all_stop(together: tuple[Path, list[dict[str, Any]]]) -> None:
    """After the same step, for the same reason, with a checkpoint that all have written."""
    folder, everywhere = together
    outcomes = {name: {(seen[name]["steps"], seen[name]["stopped"]) for seen in everywhere} for name in (
        "1 to many", "ddp first", "fsdp then",
    )}  # fmt: skip
    assert outcomes["1 to many"] == {(4, "requeue")}
    assert outcomes["ddp first"] == {(1, "requeue")}
    assert outcomes["fsdp then"] == {(4, "interrupt")}
    assert checkpoints(folder / "mixed" / "checkpoints")[-1].name == "step-00000004"
    for name in ("ddp shared", "fsdp shared"):
        newest = checkpoints(folder / name / "checkpoints")[-1]
        files = {path.name for path in newest.iterdir()}
        assert files == {*json.loads((newest / "state.json").read_text())["files"], "state.json"}
        assert len({name.partition("-model")[0] for name in files if "-model" in name}) == len(everywhere)


def test_on_one_then_on_many_then_on_one(
    together: tuple[Path, list[dict[str, Any]]], alone: dict[str, Any]
) -> None:
    folder, everywhere = together
    same_losses(everywhere[0]["1 to many"], alone["shared"], slice(2, 4))
    same_losses(everywhere[0]["1 to fsdp"], alone["shared"], slice(2, 6))
    same_weights(folder / "1 to fsdp", alone["shared weights"])
    assert spread_run(folder / "1 to fsdp", ALONE)["steps"] == 6  # what was saved right after an evaluation
    same_weights(folder / "1 to fsdp", alone["shared weights"])
    back = spread_run(folder / "1 to many", ALONE)
    same_losses(back, alone["shared"], slice(4, 6))
    same_weights(folder / "1 to many", alone["shared weights"])


def test_ddp_then_fsdp_then_one(together: tuple[Path, list[dict[str, Any]]], alone: dict[str, Any]) -> None:
    folder, everywhere = together
    same_losses(everywhere[0]["ddp first"], alone["shared"], slice(0, 1))
    same_losses(everywhere[0]["fsdp then"], alone["shared"], slice(1, 4))
    back = spread_run(folder / "mixed", ALONE)
    same_losses(back, alone["shared"], slice(4, 6))
    same_weights(folder / "mixed", alone["shared weights"])


def test_what_goes_wrong_for_one_stops_all(together: tuple[Path, list[dict[str, Any]]]) -> None:
    """None is left waiting for the others."""
    folder, everywhere = together
    (spoilt,) = {seen["spoilt"] for seen in everywhere}
    assert spoilt.startswith("TrainingError: step 3: loss nan and gradient norm nan are not both finite")
    assert json.loads((folder / "spoilt" / "bad-batch.json").read_text())["batch"]["windows"] == [32]
    (damaged,) = {seen["damaged"] for seen in everywhere}
    assert "step-00000006: damaged checkpoint (shard-" in damaged
    assert "sha256" in damaged
    (too_many,) = {seen["too many"] for seen in everywhere}
    assert f"cannot be shared by {len(everywhere)} devices" in too_many


# Who we are


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without launchers."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "MASTER_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            monkeypatch.delenv(name)
    return monkeypatch


def test_the_environment_tells(nowhere: pytest.MonkeyPatch) -> None:
    with join("cpu") as world:
        assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
        assert world.sum([1, 2.5]) == [1.0, 2.5]
        assert world.gather("x") == ["x"]
    nowhere.setenv("RANK", "0")
    nowhere.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the environment lacks LOCAL_RANK; start several processes with"):
        join("cpu").__enter__()
    nowhere.setenv("LOCAL_RANK", "0")
    with pytest.raises(
        ValueError, match="torchrun started 2 processes, but MASTER_ADDR and MASTER_PORT does"
    ):
        join("cpu").__enter__()


def test_what_slurm_tells(nowhere: pytest.MonkeyPatch) -> None:
    """Of its jobs only the tasks of a step belong together; a script and its shells know the job's number."""
    for name, value in (("PROCID", "0"), ("NTASKS", "4"), ("LOCALID", "0")):
        nowhere.setenv(f"SLURM_{name}", value)
    nowhere.setenv("MASTER_ADDR", "127.0.0.1")  # exported by the script
    with join("cpu") as world:
        assert world.size == 1
    nowhere.setenv("SLURM_STEP_NUM_TASKS", "1")  # srun --pty bash
    with join("cpu") as world:
        assert world.size == 1
    nowhere.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(ValueError, match="srun started 4 processes, but MASTER_PORT does not say where they"):
        join("cpu").__enter__()


def test_two_processes_of_torchrun_and_one_gpu(nowhere: pytest.MonkeyPatch) -> None:
    """Slurm's tasks may each be shown one of their own, as their first; torchrun's all see the same."""
    nowhere.setattr(torch.cuda, "is_available", lambda: True)
    nowhere.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("SLURM_PROCID", "0")):
        nowhere.setenv(name, value)
    for name, value in (("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "1")):
        nowhere.setenv(name, value)
    with pytest.raises(ValueError, match="process 1 of this machine finds no GPU for it"):
        join().__enter__()


def test_one_tells_for_all() -> None:
    """Who raises what another has raised is silent, and who lost contact with it; else it says that it lost it."""
    lost = RuntimeError(
        "[third_party/gloo/pair.cc:553] Connection closed by peer [1.2.3.4]:5. This is typical."
    )
    store = dist.HashStore()
    told = _instead(lost, store, 1, 4)
    assert str(told) == (
        "process 1 of 4 lost contact with another, which was killed or cannot be reached "
        "(RuntimeError: [third_party/gloo/pair.cc:553] Connection closed by peer [1.2.3.4]:5)"
    )
    assert type(told) is ConnectionError
    assert type(_instead(dist.DistNetworkError("gone"), store, 2, 4)) is ToldByAnother
    store, mine, theirs = dist.HashStore(), ValueError("a shard"), ValueError("a shard")
    assert _instead(mine, store, 1, 4) is None
    assert re.fullmatch(r"so says process 1 of 4, on \S+", mine.__notes__[0])
    assert type(_instead(theirs, store, 2, 4)) is ToldByAnother
    assert _instead(ValueError("another shard"), store, 3, 4) is None
    assert type(_instead(lost, store, 0, 4)) is ToldByAnother
    store, known = dist.HashStore(), ToldByAnother("a full disk")
    assert _instead(known, store, 0, 4) is None  # as it is; who lost contact now may be the first to tell
    assert type(_instead(lost, store, 1, 4)) is ConnectionError
    for _ in range(2):  # a person's Ctrl-C is never turned into an error
        assert _instead(KeyboardInterrupt(), store, 0, 4) is None

    class Gone:
        def add(self, key: str, amount: int) -> int:
            raise dist.DistNetworkError("no store")

    assert type(_instead(lost, Gone(), 1, 4)) is ConnectionError  # type: ignore[arg-type]
    assert _instead(ValueError("x"), Gone(), 1, 4) is None  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "reason",
    [
        "ncclInvalidUsage: This usually reflects invalid usage of NCCL library.\nLast error:\nDuplicate GPU detected",
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 'out of memory'",
    ],
)
def test_what_nccl_says_of_this_process_is_no_lost_contact(reason: str) -> None:
    mine = dist.DistBackendError(f"NCCL error in: NCCLUtils.cpp:77, {reason}")
    assert _instead(mine, dist.HashStore(), 1, 2) is None
    remote = dist.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:77, ncclRemoteError: A call failed possibly due to"
    )
    assert type(_instead(remote, dist.HashStore(), 1, 2)) is ConnectionError


def test_every_start_has_a_part_of_the_store_of_its_own() -> None:
    """Also after one of more processes, of which one had asked and none came to answer."""
    store = dist.HashStore()
    store.set("asked by 3", "of a start that came to nothing")
    for size in (4, 4, 2, 3):
        with ThreadPoolExecutor(size) as threads:
            ranks = reversed(range(size))
            parts = list(threads.map(part_of_this_start, [store] * size, ranks, [size] * size))
        assert not any(part.check(["address"]) for part in parts)  # of those before
        parts[0].set("address", "here")
        assert [part.get("address") for part in parts] == [b"here"] * size


def test_a_start_whose_processes_do_not_come() -> None:
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=0.05))
    with pytest.raises(ConnectionError, match="2 of 3 processes have not come; start all of them again"):
        part_of_this_start(store, 0, 3)


def test_where_weights_come_in_bfloat16() -> None:
    """Only several GPUs under fsdp exchange them so; everywhere else evaluations see them whole."""
    for size in (1, 2):
        for device in ("cpu", "cuda"):
            for strategy in ("ddp", "fsdp"):
                for precision in ("float32", "bfloat16"):
                    world = World(size=size, device=torch.device(device))
                    found = gathers_in_half(world, ComputeSettings(strategy=strategy, precision=precision))
                    assert found == ((size, device, strategy, precision) == (2, "cuda", "fsdp", "bfloat16"))
