"""`mobilellm cost`: days, the card's figures beside them, and the assumptions said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mobilellm.cli.cost import CARD_DAYS, card_days, card_mfu, parse_tokens
from mobilellm.cli.main import _main
from mobilellm.layouts import config_json
from mobilellm.presets import preset

from .refusals import refusal


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert _main(["cost", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def records(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, dict[str, Any]]:
    answer = json.loads(output(capsys, "--json", *arguments))
    return {model["name"]: model for model in answer["models"]}


def test_the_card_s_figures_and_what_they_imply(capsys: pytest.CaptureFixture[str]) -> None:
    """1T tokens / (days x 32 GPUs) and its MFU, as computed by hand from the published days."""
    rows = {line.split()[0]: line.split() for line in output(capsys).splitlines() if line.split()}
    assert rows["125m"][-4:] == ["3", "120,563", "37%", "29%"]
    assert rows["350m"][-4:] == ["6", "60,282", "47%", "40%"]
    assert rows["600m"][-4:] == ["8", "45,211", "61%", "52%"]
    assert rows["1b"][-4:] == ["12", "30,141", "66%", "58%"]
    assert rows["1.5b"][-4:] == ["18", "20,094", "65%", "58%"]
    assert rows["ls-125m"][-4:] == ["-"] * 4


def test_every_assumption_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--tokens", "250B", "--devices", "8", "--hardware", "H200", "--sequence", "1024")
    for assumption in (
        "250B tokens on 8 x h200, 989 TFLOP/s each (dense bf16",
        "sequences of 1,024 tokens",
        "6N and causal attention",
        "perfect scaling",
        "nothing is recomputed",
        "Card: 1T tokens on 32 A100-80G (312 TFLOP/s)",
        "in whole days",
    ):
        assert assumption in text
    assert "interpolated in the width" not in text
    assert "interpolated in the width" in output(capsys, "--mfu", "auto")


def test_days_follow_tokens_devices_peak_and_mfu(capsys: pytest.CaptureFixture[str]) -> None:
    base = records(capsys, "125m")["125m"]
    assert base["estimate"]["mfu"] == pytest.approx(0.45)
    days = base["estimate"]["days"]
    flops = 6 * (124_635_456 - 35_136) + 3 * 2 * 30 * 576 * 2049
    assert days == pytest.approx(1e12 * flops / (32 * 312e12 * 0.45) / 86_400)
    assert base["device_hours"] == pytest.approx(days * 24 * 32)
    for arguments, factor in (
        (["--tokens", "500B"], 1 / 2),
        (["--devices", "64"], 1 / 2),
        (["--hardware", "h100"], 312 / 989),
        (["--peak-tflops", "156"], 2),
        (["--mfu", "0.9"], 1 / 2),
    ):
        changed = records(capsys, "125m", *arguments)["125m"]
        assert changed["estimate"]["days"] == pytest.approx(days * factor), arguments
        assert changed["card"] == base["card"]


def test_sharing_layers_costs_what_executing_them_costs(capsys: pytest.CaptureFixture[str]) -> None:
    models = records(capsys)
    head = 6 * 576 * 32_000
    once = models["125m"]["training_flops_per_token"] - head
    assert models["ls-125m"]["training_flops_per_token"] - head == 2 * once
    assert models["ls-125m"]["estimate"]["days"] > 1.8 * models["125m"]["estimate"]["days"]


def test_auto_gives_the_card_its_own_days_back(capsys: pytest.CaptureFixture[str]) -> None:
    models = records(capsys, "--mfu", "auto")
    for name, days in CARD_DAYS.items():
        assert models[name]["estimate"]["days"] == pytest.approx(days)
        assert models[name]["estimate"]["mfu"] == pytest.approx(models[name]["card"]["mfu"])
    between = card_mfu(replace(preset("125m"), hidden_size=768))
    assert between == pytest.approx((card_mfu(preset("125m")) + card_mfu(preset("350m"))) / 2)
    assert card_mfu(preset("tiny")) == card_mfu(preset("ls-125m")) == card_mfu(preset("125m"))
    assert card_mfu(replace(preset("1.5b"), hidden_size=4096)) == card_mfu(preset("1.5b"))


def test_the_card_s_model_is_known_by_its_shape(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    untied = replace(preset("1.5b"), tie_word_embeddings=False)  # the official 1.5B checkpoint
    (tmp_path / "config.json").write_text(json.dumps(config_json(untied, "llama", "bfloat16")))
    (model,) = records(capsys, str(tmp_path)).values()
    assert model["card"]["days"] == 18
    assert card_days(preset("ls-125m")) is card_days(replace(preset("125m"), num_layers=29)) is None


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("1T", 1e12), ("250B", 2.5e11), ("250b", 2.5e11), ("1.5e9", 1.5e9), ("0.5G", 5e8), ("1500000", 1.5e6),
     (" 20M ", 2e7), ("3k", 3e3), ("1E+9", 1e9)],
)  # fmt: skip
def test_tokens(text: str, tokens: float) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize(
    "text", ["", "T", "lots", "-1T", "1X", "1TB", "0", "0.1", "nan", "inf", "1e999", "1,5T"]
)
def test_bad_tokens(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="must be a positive number such as 1T"):
        parse_tokens(text)
    assert f"--tokens {text!r}" in refusal(capsys, "cost", f"--tokens={text}")


def test_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert "'126m' is neither a preset" in refusal(capsys, "cost", "126m")
    assert "'no/such' is neither" in refusal(capsys, "cost", "no/such")
    assert "hardware 'abacus' is not known; choose one of a100, h100" in refusal(
        capsys, "cost", "--hardware", "abacus"
    )
    assert "--mfu 'fast' must be a number" in refusal(capsys, "cost", "--mfu", "fast")
    for mfu in ("0", "1.5", "45", "nan"):
        assert "must be above 0 and at most 1" in refusal(capsys, "cost", "--mfu", mfu)
    assert "--devices 0" in refusal(capsys, "cost", "--devices", "0")
    assert "--sequence 0" in refusal(capsys, "cost", "--sequence", "0")
    assert "--peak-tflops -1" in refusal(capsys, "cost", "--peak-tflops=-1")


def test_in_a_pipe() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from mobilellm.cli.main import main; main(['cost', '--tokens', '2B'])"],
        capture_output=True,
        env={**os.environ, "COLUMNS": "40", "PYTHONIOENCODING": "ascii"},
        timeout=300,
        check=True,
    )
    assert done.stderr == b""
    row = next(line for line in done.stdout.decode("ascii").splitlines() if line.startswith("125m"))
    assert row.split("|")[-1].strip() == "29%"
