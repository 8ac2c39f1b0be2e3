"""A plan as `mobilellm train RECIPE --plan` prints it."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from mobilellm.accounting import SECONDS_PER_DAY
from mobilellm.cli.tables import print_notes, print_sheet, print_table
from mobilellm.report.durations import duration
from mobilellm.train.plan import HEADROOM, DataUse, Pace, Plan
from mobilellm.train.teacher_cost import Teaching


def print_plan(plan: Plan) -> None:
    print_sheet(_what(plan))
    print()
    print_table(("memory a device", "as planned", _other_way(plan)), _memory_rows(plan))
    print()
    header = (
        "how long",
        "devices",
        "TFLOP/s\neach",
        "assumed\nMFU",
        "tokens/s",
        "time",
        "memory\neach",
        "fits",
    )
    print_table(header, [_pace_row(pace) for pace in plan.paces])
    print_notes(_notes(plan))


def _pace_row(pace: Pace) -> tuple[str, ...]:
    return (
        pace.hardware,
        f"{pace.devices:,}",
        f"{pace.peak_flops / 1e12:,.3g}",
        f"{pace.mfu:.0%}",
        f"{pace.tokens_per_second:,.0f}",
        duration(pace.days * SECONDS_PER_DAY),
        "-" if pace.memory_bytes is None else f"{pace.memory_bytes / 1e9:,.0f} GB",
        "-" if pace.fits is None else "yes" if pace.fits else "no",
    )


def plan_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON holds it, totals included."""
    values = asdict(plan)
    values["parameters"]["total"] = plan.parameters.total
    values["memory"]["total"] = plan.memory.total
    values["memory_otherwise"]["total"] = plan.memory_otherwise.total
    return values


def _what(plan: Plan) -> list[tuple[str, str]]:
    held = plan.micro_batch * plan.sequence_length
    rows = [
        ("parameters", f"{plan.parameters.total:,}" + _trained(plan)),
        ("devices", f"{plan.world_size:,}" + (f", {plan.strategy}" if plan.world_size > 1 else "")),
        ("steps", f"{plan.steps:,} of {plan.tokens_per_step:,} tokens"),
        (
            "a step on a device",
            f"{plan.micro_batches:,} micro-batch{'es' if plan.micro_batches > 1 else ''} of "
            f"{plan.micro_batch:,} x {plan.sequence_length:,} = {held:,} tokens",
        ),
        ("tokens", f"{plan.tokens:,}"),
        ("FLOPs", f"{plan.flops:.3g} ({plan.flops_per_token / 1e9:.3f} G a token)"),
    ]
    if plan.teaching is not None:
        rows += _teaching_rows(plan.teaching)
    rows += [("data", _use(use)) for use in plan.data]
    rows.append(
        (
            "checkpoints",
            f"{_size(plan.checkpoint_bytes)} each, at most {plan.checkpoints_kept:,} at a time: "
            f"{_size(plan.checkpoint_bytes * plan.checkpoints_kept)} of disk",
        )
    )
    return rows


def _teaching_rows(teaching: Teaching) -> list[tuple[str, str]]:
    held = f"{teaching.cache}: {teaching.cache_passages:,} passages there"
    if teaching.teacher is None:
        return [("teacher", "need not run"), ("teacher's cache", held)]
    most = "at most " if teaching.at_most else ""
    runs = (
        f"runs first, over {most}{teaching.passages:,} passages of {teaching.tokens:,} tokens in all, "
        f"{teaching.flops:.3g} FLOPs"
        if teaching.passages
        else "need not run"
    )
    return [
        ("teacher", f"{teaching.teacher}, {teaching.parameters:,} parameters; {runs}"),
        ("teacher's cache", f"{held}, {most}{_size(teaching.cache_bytes_added)} to come"),
    ]


def _trained(plan: Plan) -> str:
    return "" if _trains_all(plan) else f", {plan.trained_parameters:,} of adapters trained"


def _trains_all(plan: Plan) -> bool:
    return plan.trained_parameters == plan.parameters.total


def _use(use: DataUse) -> str:
    if use.tokens is None:
        return f"{use.folder}: no shards there yet"
    epochs = "" if use.epochs is None else f", {use.epochs:,.3g} times over"
    return f"{use.folder}: {use.tokens:,} tokens{epochs}"


def _other_way(plan: Plan) -> str:
    return ("without" if plan.activation_checkpointing else "with") + " activation\ncheckpointing"


def _memory_rows(plan: Plan) -> list[tuple[str, ...]]:
    names = {
        "weights": "weights, float32" if _trains_all(plan) else "weights, adapters in float32",
        "gradients": "gradients",
        "optimizer": "optimizer",
        "copies": "copies of weights",
        "activations": "activations",
        "loss": "loss: a chunk of logits, gradients",
        "checkpoint": "copy that a checkpoint is written from",
        "batches": "batches, read ahead",
        "merged": "the merged model that is evaluated",
    }
    parts = asdict(plan.memory), asdict(plan.memory_otherwise)
    rows = [
        (words, *(_size(part[name]) for part in parts))
        for name, words in names.items()
        if any(part[name] for part in parts)
    ]
    both = (plan.memory, plan.memory_otherwise)
    rows.append(("together", *(_size(each.total) for each in both)))
    if plan.teaching is not None and plan.teaching.memory_bytes:
        beside = plan.teaching.memory_bytes
        rows.append(("before: teacher, weights", *(_size(each.weights + beside) for each in both)))
    return rows


def _notes(plan: Plan) -> list[str]:
    device = plan.device
    notes = [
        "Memory is counted, not measured: kernels' workspaces, fragmentation and the driver come on top, so "
        f"a plan fits where {1 - HEADROOM:.0%} of the memory stays free. Document masks are not counted. "
        "Processes on a CPU share its memory and its cores.",
    ]
    if plan.rounds_weights:
        notes.append(
            "The time to round weights is not counted: on two cores a step takes 1.05 to 1.12 times as long "
            "with [qat] (measured)."
        )
    if any(pace.fits is False for pace in plan.paces):
        notes.append(f"Where it does not fit: {', '.join(_wishes(plan))}.")
    other = "cpu" if device.is_gpu else "cuda"
    repeated = "The time includes the forward pass that activation checkpointing repeats. "
    notes += [
        f"The memory by part and the first of the times are for this machine's {device.name}, "
        f"{device.peak_flops / 1e12:,.3g} TFLOP/s ({device.peak_source}; another: --device "
        f"{other}). The other times: data sheets.",
        "MFU is assumed, counting 6N and causal attention; perfect scaling, no stops, no evaluation. "
        + (repeated if plan.activation_checkpointing else "")
        + "mobilellm cost tells it for other hardware and MFU.",
    ]
    return notes


def _wishes(plan: Plan) -> list[str]:
    wishes = ["a smaller --batch.micro-batch"] if plan.micro_batch > 1 else []
    if not plan.activation_checkpointing:
        wishes.append("--compute.activation-checkpointing")
    if plan.strategy != "fsdp" and _trains_all(plan):
        wishes.append("--compute.strategy fsdp on several devices")
    return wishes or ["more devices"]


def _size(count: int) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"
