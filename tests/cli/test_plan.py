"""`mobilellm train RECIPE --plan`: says what would happen, and does nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mobilellm.cli.main import _main
from mobilellm.cli.plan_sheet import plan_json, print_plan
from mobilellm.presets import preset
from mobilellm.train.device import Device
from mobilellm.train.plan import make_plan
from mobilellm.train.recipe import load_recipe

CARD = Device("NVIDIA H100 80GB HBM3", 85 * 10**9, 989e12, "dense bf16, data sheet", is_gpu=True)


def sheet(capsys: pytest.CaptureFixture[str], name: str, devices: int) -> dict[str, list[str]]:
    """Lines by their first word, cut at two spaces or more."""
    recipe = load_recipe(name)
    print_plan(make_plan(recipe, recipe.model.config(), devices, CARD))
    cut = [line.split("  ") for line in capsys.readouterr().out.splitlines()]
    parts = [[part.strip() for part in line if part.strip()] for line in cut]
    return {line[0]: line[1:] for line in parts if line}


def test_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    lines = sheet(capsys, "pretrain-125m", 32)
    assert lines["parameters"] == ["124,635,456"]
    assert lines["devices"] == ["32, ddp"]
    assert lines["a step on a device"] == ["1 micro-batch of 32 x 2,048 = 65,536 tokens"]
    assert lines["tokens"] == ["1,006,632,960,000"]
    assert lines["FLOPs"] == ["9.66e+20 (0.960 G a token)"]
    assert lines["data"] == ["shards: no shards there yet"]
    assert lines["weights, float32"] == ["0.50 GB", "0.50 GB"]
    assert lines["optimizer"] == ["1.00 GB", "1.00 GB"]
    assert lines["a100"][:3] == ["32", "312", "45%"]
    assert lines["a100"][4:] == ["2 d 11 h", "80 GB", "yes"]
    assert lines["h200"][4:] == ["18 h 50 min", "141 GB", "yes"]
    assert lines["NVIDIA H100 80GB HBM3"][4:] == ["18 h 50 min", "85 GB", "yes"]
    assert not any(line.startswith("Where it does not fit") for line in lines)


def test_parts_make_the_whole() -> None:
    recipe = load_recipe("pretrain-1.5b")
    plan = make_plan(recipe, recipe.model.config(), 8, CARD)
    values = json.loads(json.dumps(plan_json(plan)))
    for name in ("parameters", "memory", "memory_otherwise"):
        parts = values[name]
        total = parts.pop("total")
        assert total == sum(parts.values())
    assert values["device"]["name"] == CARD.name
    assert [pace["hardware"] for pace in values["paces"]] == [CARD.name, "a100", "h100", "h200"]


def test_what_to_do_where_it_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    lines = sheet(capsys, "tiny-cpu", 1)
    assert not any("does not fit" in line for line in lines)
    recipe = load_recipe("pretrain-1.5b")
    small = Device("small", 10**9, 1e14, "given", is_gpu=True)
    print_plan(make_plan(recipe, recipe.model.config(), 8, small))
    text = capsys.readouterr().out
    assert (
        "Where it does not fit: a smaller --batch.micro-batch, --compute.activation-checkpointing, "
        "--compute.strategy fsdp on several devices." in text
    )


def test_what_is_not_counted_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    for name, is_said in (("qat-cpu", True), ("tiny-cpu", False)):
        recipe = load_recipe(name)
        config = replace(preset("test"), max_position_embeddings=2048)
        print_plan(make_plan(recipe, config, 1, CARD))
        said = " ".join(capsys.readouterr().out.split())
        assert ("a step takes 1.05 to 1.12 times as long with [qat]" in said) == is_said


def test_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before there is data, and without touching the disk."""
    none = str(tmp_path / "none")
    arguments = ["train", "pretrain-350m", "--data.train", none, "--plan", "--devices", "16"]
    assert _main([*arguments, "--json", "--out", str(tmp_path / "out"), "--batch.micro-batch", "4"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["parameters"]["total"] == 345_355_200
    assert (plan["micro_batch"], plan["micro_batches"], plan["world_size"]) == (4, 16, 16)
    assert plan["data"] == [{"folder": none, "tokens": None, "epochs": None}]
    assert list(tmp_path.iterdir()) == []
    assert _main([*arguments[:-1], "3"]) == 2
    assert "1024 sequences, which 3 devices cannot share evenly" in capsys.readouterr().err


def test_for_the_device_that_was_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def device(precision: str, kind: str | None) -> Device:
        asked.append((precision, kind))
        return Device("an abacus", 10**9, 1e9, "counted", is_gpu=kind != "cpu")

    monkeypatch.setattr("mobilellm.train.device.this_device", device)
    arguments = ["train", "tiny-cpu", "--data.train", str(tmp_path / "none"), "--plan"]
    assert _main([*arguments, "--device", "cpu"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the first of the times are for this machine's an abacus, 0.001 TFLOP/s (counted;" in printed
    assert "another: --device cuda)" in printed
    assert _main(arguments) == 0
    assert asked == [("bfloat16", "cpu"), ("bfloat16", None)]


def test_refuses_a_device_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train", "tiny-cpu", "--data.train", str(tmp_path / "none"), "--plan", "--device", "tpu"]
    assert _main(arguments) == 2
    assert "'tpu' cannot be trained on; choose cpu or cuda" in capsys.readouterr().err
