"""What a quickstart comes to: the held-out numbers before and after, the picture, the page."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mobilellm.atomic import atomic_write
from mobilellm.cli.quickstart_folder import recorded
from mobilellm.config import ModelConfig
from mobilellm.data.shards import ShardIndex
from mobilellm.train.recipe import Recipe
from mobilellm.train.settings import TrainSettings


def write_report(
    out: Path,
    config: ModelConfig,
    recipe: Recipe,
    index: ShardIndex,
    seconds: float,
    sample: tuple[str, str],
    commands: Sequence[str],
) -> dict[str, Any]:
    """Write loss.png, report.html and, last, report.json into `out`; the results that it holds.

    `sample` is a prompt and its completion; `commands` are what to do next.
    """
    from mobilellm import __version__
    from mobilellm.report.page import run_page
    from mobilellm.report.plots import loss_curve

    records = recorded(out, recipe.steps)
    evaluations = [record["eval"] for record in records if "eval" in record]
    steps = [record for record in records if "loss" in record]
    settings, most = asdict(recipe), recipe.data.held_out_tokens
    is_all = index.total("held-out", "tokens") <= most
    evaluated = "every held-out token once" if is_all else f"the first {most:,} held-out tokens once"
    rate = steps[-1]["tokens"] / sum(record["seconds"] for record in steps)
    results = {
        "before": evaluations[0],
        "after": evaluations[-1],
        "tokens_per_second": rate,
        "held_out_bytes": index.total("held-out", "bytes"),
        "protocol": f"{evaluated}, windows of {recipe.batch.sequence_length}",
        "config": config.to_dict(),
        "settings": {name: settings[name] for name in TrainSettings.__dataclass_fields__},
        "source": index.source,
        "version": __version__,
    }
    picture = loss_curve(
        records, f"quickstart: {config.num_steps} steps deep, {config.num_layers} blocks stored"
    )
    page = run_page(
        title="MobileLLM quickstart",
        lead=f"{config.num_layers} blocks, each run {config.repeats} times, trained on {index.source}.",
        results=result_rows(results),
        facts={
            "training tokens seen": f"{steps[-1]['tokens']:,}",
            "tokens per second": f"{rate:,.0f}",
            "this command": f"{seconds:.0f} s",
            "width, heads, KV heads": f"{config.hidden_size}, {config.num_heads}, {config.num_kv_heads}",
            "vocabulary": f"{config.vocab_size:,}",
            "machine": f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}",
            "protocol": str(results["protocol"]),
        },
        picture=picture,
        samples=[sample],
        commands=list(commands),
    )
    with atomic_write(out / "loss.png") as temporary:
        temporary.write_bytes(picture)
    with atomic_write(out / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    with atomic_write(out / "report.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def result_rows(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """A table, its header first."""
    before, after = results["before"], results["after"]
    return [
        ("held-out text", "before", "after"),
        ("perplexity (per token)", f"{before['perplexity']:,.1f}", f"{after['perplexity']:,.1f}"),
        ("bits per byte", f"{before['bits_per_byte']:.3f}", f"{after['bits_per_byte']:.3f}"),
    ]


def print_results(results: Mapping[str, Any]) -> None:
    for row in result_rows(results):
        print("      " + row[0].ljust(26) + row[1].rjust(10) + row[2].rjust(10))
