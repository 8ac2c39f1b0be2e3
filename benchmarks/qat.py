"""Quantisation-aware training against training on and rounding to nearest, the same steps of both.

    python benchmarks/qat.py runs/tiny shards --work runs/qat --out docs/results/qat.json

Of every scheme: held-out perplexity of the model, of what round-to-nearest makes of it, of both after
training on in full precision, and of what quantisation-aware training leaves. "recovered" is the share of
what round-to-nearest costs the model trained on that is not lost: 1 where the quantised model is as good.
The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import child, write

import mobilellm
from mobilellm.data.shards import read_split
from mobilellm.eval.perplexity import windowed
from mobilellm.quant.qat import QuantizedWhile
from mobilellm.quant.schemes import scheme
from mobilellm.train.qat import QatChoice
from mobilellm.train.recipe import Recipe, load_recipe, to_toml


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--out", type=Path, help="JSON file of the results")
    parser.add_argument(
        "--schemes", nargs="+", default=["q4_0", "q4_0,q8_0", "8da4w"], help="NAME[,EMBEDDING]"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--held-out-tokens", type=int, default=100_000, help="to evaluate on")
    arguments = parser.parse_args()

    recipe = load_recipe("qat-cpu")
    batch = replace(recipe.batch, tokens_per_step=arguments.tokens_per_step)
    recipe = replace(
        recipe,
        steps=arguments.steps,
        evaluate_every=arguments.steps,
        batch=batch,
        optim=replace(recipe.optim, lr=arguments.lr),
        model=replace(recipe.model, init_from=arguments.model),
        data=replace(recipe.data, train=(arguments.shards,), held_out_tokens=arguments.held_out_tokens),
        qat=None,
    )
    arguments.work.mkdir(parents=True, exist_ok=True)
    plain = run(arguments.work, "plain", recipe)
    found: dict[str, Any] = {
        "source": plain["before"]["perplexity"],
        "trained on": plain["after"]["perplexity"],
        "steps": recipe.steps,
        "tokens_per_step": batch.tokens_per_step,
        "lr": arguments.lr,
        "schemes": {},
    }
    for spelling in arguments.schemes:
        name, _, embedding = spelling.partition(",")
        choice = QatChoice(scheme=name, embedding=embedding or None)
        trained = run(arguments.work, spelling.replace(",", "-"), replace(recipe, qat=choice))
        rounded = rounded_perplexity(arguments.work / "plain", choice, recipe)
        lost = rounded - found["trained on"]
        found["schemes"][spelling] = {
            "source, rounded": trained["before"]["perplexity"],
            "trained on, rounded": rounded,
            "quantisation-aware": trained["after"]["perplexity"],
            "recovered": (rounded - trained["after"]["perplexity"]) / lost,
        }
    write(arguments.out, found)


def run(work: Path, name: str, recipe: Recipe) -> dict[str, Any]:
    """What `mobilellm train` prints of it; it is gone on with, or only read, where it was begun."""
    (work / f"{name}.toml").write_text(to_toml(recipe), encoding="utf-8")
    command = [sys.executable, "-m", "mobilellm", "train", str(work / f"{name}.toml")]
    return child([*command, "--out", str(work / name), "--device", "cpu", "--json"])


def rounded_perplexity(model: Path, choice: QatChoice, recipe: Recipe) -> float:
    """Of what round-to-nearest makes of a model, as the runs evaluate theirs."""
    loaded = mobilellm.load(model, "float32")
    (shards,) = recipe.data.train
    stream = np.asarray(read_split(shards, "held-out", loaded.tokenizer)[: recipe.data.held_out_tokens])
    with QuantizedWhile(loaded.model, scheme(choice.scheme, choice.embedding, choice.group))():
        return windowed(loaded.model, stream, recipe.batch.sequence_length).perplexity


if __name__ == "__main__":
    main()
