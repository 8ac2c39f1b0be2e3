"""Days to pretrain on given hardware, beside the figures of the official model card.

The card says 3, 6, 8, 12 and 18 days for 1T tokens of 125M to 1.5B on 32 A100-80G. Days here follow from
FLOPs per token, the hardware's peak and the share of it that is reached (MFU); every assumption is printed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from json import dumps
from typing import Annotated

import tyro

from mobilellm.accounting import (
    SECONDS_PER_DAY,
    check_positive,
    check_utilisation,
    days_to_train,
    mfu,
    tokens_per_second,
    training_flops_per_token,
)
from mobilellm.cli.subject import Subject, find_subject
from mobilellm.cli.tables import print_notes, print_table
from mobilellm.config import ModelConfig
from mobilellm.hardware import PEAK_TFLOPS, named_peak_flops
from mobilellm.presets import PUBLISHED, preset

CARD_DAYS = {"125m": 3, "350m": 6, "600m": 8, "1b": 12, "1.5b": 18}
"""Days for CARD_TOKENS on CARD_DEVICES of CARD_HARDWARE: official model card and repository README."""
CARD_TOKENS, CARD_DEVICES, CARD_HARDWARE, CARD_SEQUENCE = 1e12, 32, "a100", 2048

_SUFFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}


@dataclass(frozen=True)
class Arguments:
    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PRESET|PATH ...]")] = ()
    """Presets; paths of a model directory, config.json or run directory. Default: the published presets."""

    tokens: str = "1T"
    """Tokens to train on: 1T, 250B, 1.5e9."""

    devices: int = 32
    """Number of GPUs."""

    hardware: str = "a100"
    """GPU: a100, h100 (SXM), h100-pcie, h200, b200, l4, l40s, rtx3090, rtx4090, mi300x."""

    peak_tflops: float | None = None
    """Dense bf16 TFLOP/s of one device, for hardware not in that list."""

    mfu: str = "0.45"
    """Share of the peak that is reached, or auto: what the card's days imply for a model of this width."""

    sequence: int | None = None
    """Training sequence length in tokens. Default: the model's context."""

    json: bool = False
    """Print one JSON object instead of a table."""


@dataclass(frozen=True)
class Throughput:
    """Training at one speed. Both MFU are of the same speed; they differ in the FLOPs counted per token."""

    days: float
    tokens_per_second_per_device: float
    mfu: float
    """Counting 6N and causal attention."""
    mfu_6n: float


@dataclass(frozen=True)
class Cost:
    """What one model costs to train, and what the card says of it (None where it says nothing)."""

    name: str
    sequence: int
    training_flops_per_token: int
    training_flops_per_token_6n: int
    estimate: Throughput
    device_hours: float
    card: Throughput | None


def run(arguments: Arguments) -> None:
    tokens = parse_tokens(arguments.tokens)
    label, peak = _hardware(arguments)
    subjects = [find_subject(name) for name in arguments.models or PUBLISHED]
    costs = [_cost(subject, arguments, tokens, peak) for subject in subjects]
    notes = _notes(arguments, tokens, label, peak)
    if arguments.json:
        setting = {
            "tokens": tokens,
            "devices": arguments.devices,
            "hardware": label,
            "peak_flops_per_device": peak,
        }
        print(dumps({**setting, "models": [asdict(cost) for cost in costs], "assumptions": notes}, indent=2))
        return
    header = (
        "model", "GFLOP\n/token", "MFU", "tokens/s\nper GPU", "days",
        "card:\ndays", "card:\ntokens/s", "card:\nMFU", "card:\n6N MFU",
    )  # fmt: skip
    print_table(header, [_row(cost) for cost in costs])
    print_notes(notes)


def parse_tokens(text: str) -> float:
    """A number of tokens: 1500000, 1.5e9, 250B, 1T (K, M, B or G, T). Raises ValueError."""
    match = re.fullmatch(r"(\d+\.?\d*(?:e[+-]?\d+)?)([KMBGT]?)", text.strip(), re.IGNORECASE)
    tokens = float(match[1]) * _SUFFIXES[match[2].upper()] if match else 0.0
    if not (tokens >= 1 and math.isfinite(tokens)):
        raise ValueError(f"tokens = {text!r} must be a positive number such as 1T, 250B or 1.5e9")
    return tokens


def card_days(config: ModelConfig) -> int | None:
    """The card's days for this architecture, tied or not; None when the card gives none."""
    for name, days in CARD_DAYS.items():
        if replace(config, tie_word_embeddings=True) == preset(name):
            return days
    return None


def card_throughput(config: ModelConfig, days: float) -> Throughput:
    """What `days` under the card's conditions means as speed and MFU."""
    speed = CARD_TOKENS / (days * SECONDS_PER_DAY * CARD_DEVICES)
    return _throughput(config, CARD_SEQUENCE, days, speed, PEAK_TFLOPS[CARD_HARDWARE] * 1e12)


def card_mfu(config: ModelConfig) -> float:
    """MFU (6N and causal attention) at this model's width, interpolated between the card's five models.

    Linear in the hidden size, level beyond both ends: width sets how well the matrix products fill a GPU.
    """
    points = [(preset(name), days) for name, days in CARD_DAYS.items()]
    widths = [each.hidden_size for each, _ in points]
    values = [card_throughput(each, days).mfu for each, days in points]
    width = min(max(config.hidden_size, widths[0]), widths[-1])
    upper = next(index for index in range(1, len(widths)) if width <= widths[index])
    share = (width - widths[upper - 1]) / (widths[upper] - widths[upper - 1])
    return values[upper - 1] + share * (values[upper] - values[upper - 1])


def _cost(subject: Subject, arguments: Arguments, tokens: float, peak: float) -> Cost:
    config = subject.config
    sequence = config.max_position_embeddings if arguments.sequence is None else arguments.sequence
    check_positive(sequence=sequence)
    utilisation = card_mfu(config) if arguments.mfu == "auto" else _parse_mfu(arguments.mfu)
    flops = training_flops_per_token(config, sequence)
    speed = tokens_per_second(flops, peak, utilisation)
    days = days_to_train(tokens, arguments.devices, speed)
    stated = card_days(config)
    return Cost(
        name=subject.name,
        sequence=sequence,
        training_flops_per_token=flops,
        training_flops_per_token_6n=training_flops_per_token(config, sequence, attention=False),
        estimate=_throughput(config, sequence, days, speed, peak),
        device_hours=days * 24 * arguments.devices,
        card=None if stated is None else card_throughput(config, stated),
    )


def _throughput(config: ModelConfig, sequence: int, days: float, speed: float, peak: float) -> Throughput:
    with_attention = training_flops_per_token(config, sequence)
    without = training_flops_per_token(config, sequence, attention=False)
    return Throughput(days, speed, mfu(with_attention, speed, peak), mfu(without, speed, peak))


def _parse_mfu(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"mfu = {text!r} must be a number such as 0.45, or auto") from None
    check_utilisation(value)
    return value


def _hardware(arguments: Arguments) -> tuple[str, float]:
    """Its name and peak FLOP/s."""
    if arguments.peak_tflops is not None:
        check_positive(peak_tflops=arguments.peak_tflops)
        return "custom", arguments.peak_tflops * 1e12
    try:
        return arguments.hardware.lower(), named_peak_flops(arguments.hardware)
    except ValueError as error:
        raise ValueError(f"{error}, or give --peak-tflops") from None


def _row(cost: Cost) -> tuple[str, ...]:
    estimate, card = cost.estimate, cost.card
    return (
        cost.name,
        f"{cost.training_flops_per_token / 1e9:.2f}",
        f"{estimate.mfu:.0%}",
        f"{estimate.tokens_per_second_per_device:,.0f}",
        _short(estimate.days),
        *(
            ("-",) * 4
            if card is None
            else (
                f"{card.days:g}",
                f"{card.tokens_per_second_per_device:,.0f}",
                f"{card.mfu:.0%}",
                f"{card.mfu_6n:.0%}",
            )
        ),
    )


def _short(number: float) -> str:
    """About three digits, never in powers of ten."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}" if number >= 0.001 else "<0.001"


def _count(tokens: float) -> str:
    suffix = next((name for name in "TBMK" if tokens >= _SUFFIXES[name]), "")
    return f"{tokens / _SUFFIXES[suffix]:g}{suffix}"


def _notes(arguments: Arguments, tokens: float, label: str, peak: float) -> Sequence[str]:
    peak_source = "given" if label == "custom" else "dense bf16, data sheet"
    sequence = "as long as the context" if arguments.sequence is None else f"of {arguments.sequence:,} tokens"
    notes = [
        f"Here: {_count(tokens)} tokens on {arguments.devices:,} x {label}, {peak / 1e12:g} TFLOP/s each "
        f"({peak_source}), sequences {sequence}, perfect scaling, no stops.",
        "MFU counts 6N and causal attention: N is every executed weight (a shared layer each time it runs, "
        "head included), backward costs two forwards, nothing is recomputed.",
    ]
    if arguments.mfu == "auto":
        notes.append(
            "MFU auto: what the card's days imply on A100 at this model's width, interpolated in the width. "
            "Faster GPUs are harder to fill, so there it is optimistic."
        )
    worst, best = (0.5 / days for days in (min(CARD_DAYS.values()), max(CARD_DAYS.values())))
    notes.append(
        f"Card: {_count(CARD_TOKENS)} tokens on {CARD_DEVICES} A100-80G ({PEAK_TFLOPS[CARD_HARDWARE]:g} "
        f"TFLOP/s), sequences of {CARD_SEQUENCE:,}, in whole days (so +-{worst:.0%} at the smallest, "
        f"+-{best:.0%} at the largest); "
        "tokens/s per GPU and MFU (6N MFU: attention left out) follow. It gives none for other models."
    )
    return notes
