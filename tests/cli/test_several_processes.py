"""[lora], [distill] and [qat] in two processes: the losses of one, or a refusal in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("peft", reason="needs the extra finetune")

from spread_commands import launch

from mobilellm.cli.main import _main
from mobilellm.model import api
from mobilellm.train.metrics import read_metrics

from .test_distillation_runs import command as distilled
from .test_distillation_runs import place as distillation_place  # noqa: F401
from .test_finetune import finetune, written_place

FLAGS = [
    "--batch.sequence-length", "96", "--batch.tokens-per-step", "384", "--batch.micro-batch", "1",
    "--evaluate-every", "4", "--checkpoint.every", "4", "--schedule.warmup-steps", "1", "--steps", "4",
    "--optim.lr", "5e-3", "--sample.prompts", "why not", "--sample.tokens", "2", "--device", "cpu",
    "--log.no-tensorboard", "--compute.precision", "float32",
]  # fmt: skip
KINDS = {
    "lora": ["--lora.rank", "4"],
    # Sums in another order give some weights another code, of which 4 bits make more than 1e-5 of a loss.
    "qat": ["--qat.scheme", "q8_0", "--qat.after-steps", "1"],
}
STRATEGIES = ("ddp", "fsdp")

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def commands(base: Path, shards: Path, out: Path, strategy: str | None) -> dict[str, list[str]]:
    spread = [] if strategy is None else ["--compute.strategy", strategy]
    found = {kind: finetune(base, out / kind, *FLAGS, *flags, *spread) for kind, flags in KINDS.items()}
    # Two sequences at a time of eight: each process has micro-batches to add up.
    flags = ["--batch.tokens-per-step", "512", "--batch.micro-batch", "2", "--steps", "4", "--device", "cpu"]
    found["distill"] = distilled(shards, out / "distill", *flags, *spread)
    return found


@pytest.fixture(scope="module")
def runs(
    distillation_place: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, dict[str, dict[str, list[tuple[int, str]]]]]:
    """Folders alone/KIND, ddp/KIND, fsdp/KIND; of the latter two what every process came to, by rank."""
    folder, base = tmp_path_factory.mktemp("spread"), written_place(tmp_path_factory.mktemp("base"))
    for name in ("alone", *STRATEGIES):
        (folder / name).mkdir()
    for arguments in commands(base, distillation_place, folder / "alone", None).values():
        assert _main(arguments) == 0
    asked = {
        (strategy, kind): arguments
        for strategy in STRATEGIES
        for kind, arguments in commands(base, distillation_place, folder / strategy, strategy).items()
    }
    everywhere = launch(2, folder, list(asked.values()))
    seen: dict[str, dict[str, list[tuple[int, str]]]] = {strategy: {} for strategy in STRATEGIES}
    for number, (strategy, kind) in enumerate(asked):
        seen[strategy][kind] = [(code, said) for code, said in (each[number] for each in everywhere)]
    return folder, seen


def numbers(out: Path) -> dict[str, Any]:
    records = read_metrics(out / "metrics.jsonl")
    return {
        "loss": [each["loss"] for each in records if "loss" in each],
        "norm": [each["gradient_norm"] for each in records if "loss" in each],
        "eval": [each["eval"]["loss"] for each in records if "eval" in each],
    }


@pytest.mark.parametrize("kind", ["lora", "qat", "distill"])
def test_ddp_gives_the_losses_of_one_process(runs: tuple[Path, Any], kind: str) -> None:
    _same(runs, "ddp", kind)


def test_fsdp_distils_as_one_process_does(runs: tuple[Path, Any]) -> None:
    _same(runs, "fsdp", "distill")


def _same(runs: tuple[Path, Any], strategy: str, kind: str) -> None:
    folder, seen = runs
    assert [code for code, _ in seen[strategy][kind]] == [0, 0], seen[strategy][kind]
    ours, alone = (numbers(folder / name / kind) for name in (strategy, "alone"))
    assert len(alone["loss"]) == 4
    assert ours["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    assert ours["norm"] == pytest.approx(alone["norm"], rel=1e-4)
    assert ours["eval"] == pytest.approx(alone["eval"], rel=1e-5)
    assert json.loads((folder / strategy / kind / "run.json").read_text())["world_size"] == 2
    made, one = (api.load(folder / name / kind, say=print).model for name in (strategy, "alone"))
    for (name, weight), other in zip(made.state_dict().items(), one.state_dict().values(), strict=True):
        assert (weight - other).abs().max() < 1e-3 * other.abs().max(), name


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("lora", "--compute.strategy fsdp does not go with lora, which has little to split; use 'ddp'"),
        ("qat", "qat needs whole matrices, which --compute.strategy fsdp splits; use 'ddp'"),
    ],
)
def test_fsdp_is_refused_by_every_process(runs: tuple[Path, Any], kind: str, words: str) -> None:
    folder, seen = runs
    for code, said in seen["fsdp"][kind]:
        assert (code, said.count("\n")) == (2, 1)
        assert words in said.replace("'fsdp'", "fsdp")
    assert not (folder / "fsdp" / kind).exists()


def test_the_teacher_is_shared_and_runs_once(runs: tuple[Path, Any]) -> None:
    """Both processes write parts of one cache, which holds every passage once."""
    import safetensors

    folder, _ = runs
    counts = {}
    for name in ("alone", *STRATEGIES):
        keys = []
        for part in sorted((folder / name / "cache").glob("part-*.safetensors")):
            with safetensors.safe_open(part, "np") as stream:
                keys += [key.tobytes() for key in stream.get_tensor("keys")]
        assert len(set(keys)) == len(keys)
        counts[name] = len(keys)
    assert counts["ddp"] == counts["fsdp"] == counts["alone"] > 8
    assert len(list((folder / "ddp" / "cache").glob("part-*"))) == 2
