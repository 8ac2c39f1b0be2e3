"""Ten stored losses: the arithmetic of training today is what it was, and what an independent program does.

The stored numbers are in tests/golden/ten_losses.json. `python tests/train/test_golden.py` writes them anew,
after a change that is meant to change them; say why in the commit.
"""

from __future__ import annotations

import json
import math
import platform
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_runs import LS, ORDINARY, tiny_loader, tiny_model, tiny_run, tiny_settings
from torch import nn

from mobilellm.config import ModelConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "ten_losses.json"
CONFIGS = {"test-ls": LS, "test": ORDINARY}
SETTINGS = tiny_settings(sequence_length=32, tokens_per_step=256, micro_batch=4, clip_norm=1.5)


def golden_run(config: ModelConfig) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as directory:
        records = tiny_run(Path(directory), SETTINGS, config).records
    return {name: [record[name] for record in records] for name in ("loss", "gradient_norm")}


@pytest.fixture(scope="module")
def runs() -> dict[str, dict[str, list[float]]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    runs = {name: golden_run(config) for name, config in CONFIGS.items()}
    torch.set_num_threads(threads)
    return runs


@pytest.mark.parametrize("name", CONFIGS)
def test_the_ten_stored_losses(runs: dict[str, dict[str, list[float]]], name: str) -> None:
    stored = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert len(stored["runs"][name]["loss"]) == 10
    assert runs[name]["loss"] == pytest.approx(stored["runs"][name]["loss"], rel=1e-5)
    assert runs[name]["gradient_norm"] == pytest.approx(stored["runs"][name]["gradient_norm"], rel=1e-4)


def test_clipping_acts_in_some_steps_only(runs: dict[str, dict[str, list[float]]]) -> None:
    """Else the golden run would not show that it is right."""
    for run in runs.values():
        assert min(run["gradient_norm"]) < SETTINGS.optim.clip_norm < max(run["gradient_norm"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_run_by_transformers_and_torch(runs: dict[str, dict[str, list[float]]], name: str) -> None:
    """Stock Llama, plain AdamW, a loop written here. Shared blocks are one module in several places."""
    config, model = CONFIGS[name], stock_llama(CONFIGS[name])
    plain = [p for n, p in model.named_parameters() if "norm" in n]
    decayed = [p for n, p in model.named_parameters() if "norm" not in n]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
        foreach=False,
        fused=False,
    )
    loader, losses, norms = tiny_loader(SETTINGS), [], []
    for step in range(10):
        tokens, targets, weights = (
            torch.from_numpy(np.ascontiguousarray(array)) for array in loader.next()[:3]
        )
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * rate(step)
        optimizer.zero_grad()
        logits = model(input_ids=tokens, use_cache=False).logits
        losses_of_tokens = nn.functional.cross_entropy(
            logits.view(-1, config.vocab_size), targets.view(-1), reduction="none"
        )
        loss = losses_of_tokens[weights.view(-1) == 1].mean()  # all but what fills the last window
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients))
        if norm > 1.5:
            for gradient in gradients:
                gradient.mul_(1.5 / norm)
        optimizer.step()
        losses.append(loss.item())
        norms.append(norm)
    assert runs[name]["loss"] == pytest.approx(losses, rel=1e-4)
    assert runs[name]["gradient_norm"] == pytest.approx(norms, rel=1e-3)


def rate(step: int) -> float:
    """Two steps of warm-up, then eight along half a cosine from 1 to 0.1."""
    return (0.5, 1.0)[step] if step < 2 else 0.55 + 0.45 * math.cos(math.pi * (step - 2) / 7)


def stock_llama(config: ModelConfig) -> Any:
    from transformers import LlamaForCausalLM

    from stock_llama import stock_config

    model = LlamaForCausalLM(stock_config(config, attn_implementation="eager"))
    missing, unexpected = model.load_state_dict(tiny_model(config).state_dict(), strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    model.tie_weights()
    model.model.layers = nn.ModuleList([model.model.layers[index] for index in config.schedule])
    model.config.num_hidden_layers = config.num_steps
    return model.train()


def write() -> None:
    torch.set_num_threads(1)
    content = {
        "what": "loss (nats a token) and gradient norm before clipping of ten steps",
        "how": "python tests/train/test_golden.py: weights and tokens of tests/train/tiny_runs.py, float32, "
        "one thread",
        "with": f"torch {torch.__version__}, numpy {np.__version__}, {platform.machine()}",
        "settings": asdict(SETTINGS),
        "runs": {name: golden_run(config) for name, config in CONFIGS.items()},
    }
    GOLDEN.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(f"wrote {GOLDEN}\n")


if __name__ == "__main__":
    write()
