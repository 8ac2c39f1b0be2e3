"""The picture at the top of README: how many times as fast as each rival, from the files of docs/results.

    python benchmarks/picture.py docs/images/measured.png

Nothing is measured here; every bar is a ratio that a benchmark wrote, of one interleaved run. Needs the
extra `plots` (matplotlib).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mobilellm.atomic import atomic_write
from mobilellm.report.speed import Bar, Panel, speed_picture

RESULTS = Path(__file__).parent.parent / "docs" / "results"


class Ratio(NamedTuple):
    part: str
    what: str
    rival: str
    value: float


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path, help="a .png")
    picture = drawn(ratios(RESULTS))
    with atomic_write(parser.parse_args().out) as beside:
        beside.write_bytes(picture)


def ratios(results: Path) -> list[Ratio]:
    """In the order of the picture."""
    train, tuned, scored, torch, served = (
        json.loads((results / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("train", "finetune", "eval", "generate", "serve")
    )
    scored, torch = scored["bfloat16"], torch["bfloat16"]
    decode, prefill = results / "bench-decode.json", results / "bench-prefill.json"
    return [
        Ratio("train", "pretraining, 125M, 1 × 512", "Trainer", _faster(train["125m"], "trainer")),
        Ratio("train", "pretraining, 7M", "Trainer", _faster(train["tiny"], "trainer")),
        Ratio("train", "fine-tuning, 125M", "TRL", _faster(tuned["125m"], "trl-rows", "trl")),
        Ratio("evaluate", "the eight tasks, 125M", "lm-eval", scored["zero_shot"]["ratio_of_speed"]),
        Ratio("evaluate", "perplexity, 125M", "transformers", scored["perplexity"]["ratio_of_speed"]),
        Ratio("run", "in PyTorch, bfloat16", "transformers", torch["decode"]["ratio_of_speed"]),
        Ratio("run", "Q8_0, first tokens", *_benched(decode, "125m:Q8_0", 0)),
        Ratio("run", "Q8_0, after 512", *_benched(decode, "125m:Q8_0", 512)),
        Ratio("run", "Q4_0, first tokens", *_benched(decode, "125m:Q4_0", 0)),
        Ratio("run", "Q4_0, after 512", *_benched(decode, "125m:Q4_0", 512)),
        Ratio("run", "LS-125M Q4_0, after 512", *_benched(decode, "ls-125m:Q4_0", 512)),
        Ratio("run", "a prompt of 512, Q8_0", *_benched(prefill, "125m:Q8_0", 512)),
        Ratio("serve", "one stream, Q8_0", "llama-server", served["ratios"]["to_llama_server_one"]),
        Ratio("serve", "eight streams, Q8_0", "llama-server", served["ratios"]["to_llama_server_eight"]),
    ]


def _faster(shape: Mapping[str, Any], *rivals: str) -> float:
    """Than the fastest of them."""
    found: list[float] = [shape["ratios"][f"ours / {rival}"]["tokens_per_second"] for rival in rivals]
    return min(found)


def _benched(path: Path, model: str, tokens: int) -> tuple[str, float]:
    """Of `mobilellm bench --json`: the fastest rival, after so many tokens or with a prompt of so many."""
    tests = json.loads(path.read_text(encoding="utf-8"))["tests"]
    rivals = [
        test
        for test in tests
        if test["mobilellm_times_faster"] is not None
        and (test["model"], test["n_depth"] + test["n_prompt"]) == (model, tokens)
    ]
    fastest = min(rivals, key=lambda test: test["mobilellm_times_faster"])
    return fastest["engine"].partition(",")[0], fastest["mobilellm_times_faster"]


def drawn(ratios: list[Ratio]) -> bytes:
    """As PNG: a bar a ratio, a colour a part of a model's life."""
    bars = [Bar(each.what, each.part, each.value, f"{each.value:.1f}× {each.rival}") for each in ratios]
    return speed_picture([Panel("", "times as fast as the rival", bars)], "")


if __name__ == "__main__":
    main()
