"""Whether a GPU computes what it should: each check compares two ways to the same numbers.

For workers of `gpu.py`. Every result has "passed", the figure and the bar it was held to. Models are small,
runs a few steps.
"""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gpu_training import ways_tried
from rival_llama import llama_of
from torch import Tensor

from mobilellm.config import ModelConfig
from mobilellm.data.loader import PackedLoader
from mobilellm.model import document_mask
from mobilellm.model.generate import generate_tokens
from mobilellm.model.training import training_hidden
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import BOS_ID
from mobilellm.train.distributed import World
from mobilellm.train.loop import Outcome, train
from mobilellm.train.loss import weighted_loss
from mobilellm.train.settings import (
    BatchSettings,
    CheckpointSettings,
    ComputeSettings,
    OptimSettings,
    ScheduleSettings,
    TrainSettings,
)

CPU = torch.device("cpu")
Result = dict[str, Any]


def small(device: torch.device) -> ModelConfig:
    """Width, heads and head_dim of a published shape, with a few of its blocks; tiny for a trial on a CPU."""
    if device.type == "cpu":
        return replace(preset("test"), max_position_embeddings=512)
    return replace(preset("125m"), num_layers=4, vocab_size=4096)


def check(name: str, device: torch.device) -> Result:
    function: Callable[[torch.device], Result] = CHECKS[name]
    return function(device)


def as_on_the_cpu(device: torch.device) -> Result:
    """Ten steps in float32."""
    return _on_both(device, "adamw", 1e-4)


def muon_as_on_the_cpu(device: torch.device) -> Result:
    """It orthogonalises in bfloat16, so that it may differ more."""
    return _on_both(device, "muon", 2e-2)


def _on_both(device: torch.device, optimizer: str, bar: float) -> Result:
    config = preset("tiny") if device.type == "cuda" else small(device)
    theirs, ours = (_losses(config, place, 10, optimizer=optimizer) for place in (CPU, device))
    return _held(_apart(ours, theirs), bar) | {"first_and_last_loss": [ours[0], ours[-1]]}


def as_transformers(device: torch.device) -> Result:
    """Logits and gradients of the same weights in float32; in bfloat16 no further from these than Llama's."""
    config = small(device)
    ours, theirs = _model(config, device), llama_of(config).to(device)
    missing = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    tokens = torch.from_numpy(np.random.default_rng(0).integers(3, config.vocab_size, (4, 512))).to(device)
    with torch.no_grad():
        exact = theirs(tokens).logits
        found = {"logits": _relative(ours(tokens), exact)}
        with torch.autocast(device.type, torch.bfloat16):
            half = {"ours": ours(tokens), "theirs": theirs(tokens).logits}
    for name, logits in half.items():
        found[f"bfloat16 {name}"] = _relative(logits.float(), exact)
    loss = weighted_loss(ours, tokens[:, :-1], tokens[:, 1:], torch.ones_like(tokens[:, 1:]).float())
    (loss / tokens[:, 1:].numel()).backward()  # type: ignore[no-untyped-call]
    theirs(tokens, labels=tokens).loss.backward()
    by_name = dict(theirs.named_parameters())
    gradients = [_relative(p.grad, by_name[name].grad) for name, p in ours.named_parameters()]
    found["gradients"] = max(gradients)
    good = found["logits"] < 1e-4 and found["gradients"] < 1e-3
    good = good and found["bfloat16 ours"] < 1.5 * found["bfloat16 theirs"]
    bars = {"logits": 1e-4, "gradients": 1e-3, "bfloat16 ours": "1.5 times bfloat16 theirs"}
    return {"passed": good, "relative_differences": found, "bars": bars}


def documents_by_varlen(device: torch.device) -> Result:
    return _documents("varlen", device)


def documents_by_flex(device: torch.device) -> Result:
    return _documents("flex", device)


def _documents(way: str, device: torch.device) -> Result:
    if device.type != "cuda":
        return {"left_out": "runs on a GPU only"}
    if not document_mask.works(way, device):
        return {"passed": False, "why": "it did not prove itself; the log says why"}
    return packed_against_alone(way, device)


def packed_against_alone(way: str, device: torch.device) -> Result:
    """Packed rows in bfloat16, and each document alone; compiled, too, and not again for other documents."""
    config = small(device)
    model, generator = _model(config, device), np.random.default_rng(0)
    tokens = generator.integers(3, config.vocab_size, (4, 512))
    tokens[:, 0] = BOS_ID
    tokens[generator.random(tokens.shape) < 1 / 60] = BOS_ID
    rows, there = np.cumsum(tokens == BOS_ID, 1), torch.from_numpy(tokens).to(device)
    segments, other = torch.from_numpy(rows), torch.zeros(rows.shape, dtype=torch.long)
    direction = torch.randn(4, 512, config.hidden_size, device=device)

    def by(ways: Sequence[str], dtype: torch.dtype | None, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states, and the gradient of the embedding."""
        model.zero_grad()
        with ways_tried(ways), torch.autocast(device.type, dtype or torch.bfloat16, dtype is not None):
            hidden = training_hidden(model, there, chosen)[0]
        (hidden.float() * direction).sum().backward()  # type: ignore[no-untyped-call]
        gradient = model.model.embed_tokens.weight.grad
        assert gradient is not None
        return hidden.detach().float(), gradient.clone()

    alone = torch.empty_like(direction)
    with torch.no_grad():
        for row, numbers in enumerate(rows):
            for number in np.unique(numbers):
                part = torch.from_numpy(numbers == number)
                alone[row, part] = model.hidden(there[row, part][None])[0]
    exact = by((), None, segments)
    dense, ours = by((), torch.bfloat16, segments), by((way,), torch.bfloat16, segments)
    found = {"dense in float32 from alone": _relative(exact[0], alone)}
    for name, each in (("dense", dense), (way, ours)):
        found[f"{name} hidden"], found[f"{name} gradient"] = map(_relative, each, exact)
    for block in model.model.layers:
        block.compile()
    compiled = by((way,), torch.bfloat16, segments)
    with torch.compiler.set_stance("fail_on_recompile"):
        by((way,), torch.bfloat16, other)
    found["compiled hidden"], found["compiled gradient"] = map(_relative, compiled, exact)
    good = found["dense in float32 from alone"] < 1e-4
    for kind in ("hidden", "gradient"):
        good = good and max(found[f"{way} {kind}"], found[f"compiled {kind}"]) < 1.5 * found[f"dense {kind}"]
    return {"passed": good, "relative_differences": found, "bar": "1.5 times dense in bfloat16"}


def compiled_as_plain(device: torch.device) -> Result:
    plain, compiled = (
        _losses(small(device), device, 6, precision="bfloat16", compile=on) for on in (False, True)
    )
    return _held(_apart(compiled, plain), 5e-3)


def resumed_as_uninterrupted(device: torch.device) -> Result:
    """Bit for bit with torch's deterministic algorithms, from a checkpoint written in the background."""
    config = small(device)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        options = {"precision": "bfloat16", "every": 3}
        whole = _losses(config, device, 6, **options)
        with tempfile.TemporaryDirectory() as folder:
            begun = _losses(config, device, 6, Path(folder), stop_after=4, **options)
            rest = _losses(config, device, 6, Path(folder), **options)
    finally:
        torch.use_deterministic_algorithms(False)
    return _held(max(_apart(begun, whole[:4]), _apart(rest, whole[3:])), 0.0) | {"losses": whole}


def ddp_as_alone(device: torch.device) -> Result:
    return _spread(device, "ddp", 1e-3)


def fsdp_as_alone(device: torch.device) -> Result:
    """Weights and residual stream are bfloat16 then."""
    return _spread(device, "fsdp", 2e-2)


def _spread(device: torch.device, strategy: str, bar: float) -> Result:
    """torch's engines over NCCL in a world of one process, with several micro-batches and a checkpoint."""
    options = {"precision": "bfloat16", "compile": device.type == "cuda", "every": 3}
    config = small(device)
    plain = _losses(config, device, 6, **options)
    with _group(device) as world, tempfile.TemporaryDirectory() as folder:
        spread = _losses(
            config, device, 6, Path(folder), world=world, strategy=strategy, stop_after=4, **options
        )
        rest = _losses(config, device, 6, Path(folder), world=world, strategy=strategy, **options)
    return _held(max(_apart(spread, plain[:4]), _apart(rest, plain[3:])), bar) | {"losses": spread}


@contextlib.contextmanager
def _group(device: torch.device) -> Iterator[World]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo")  # a machine without network has no other
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=0, world_size=1)
    try:
        yield World(0, 1, device, dist.new_group(backend="gloo"), dist.new_group(backend="gloo"))
    finally:
        dist.destroy_process_group()


def generates_as_on_the_cpu(device: torch.device) -> Result:
    """Greedy tokens of prompts of several lengths, in float32, with the cache."""
    prompts = [list(range(5, 5 + length)) for length in (1, 40, 100)]
    drawn = []
    for place in (CPU, device):
        model = _model(small(device), CPU).to(place)
        drawn.append([new.token for new in generate_tokens(model, prompts, max_new_tokens=24, stop_ids=())])
    same = sum(a == b for a, b in zip(*drawn, strict=True)) / len(drawn[0])
    return {"passed": same == 1.0, "share_of_same_tokens": same, "bar": 1.0}


CHECKS = {
    function.__name__: function
    for function in (
        as_on_the_cpu, muon_as_on_the_cpu, as_transformers, documents_by_varlen, documents_by_flex,
        compiled_as_plain, resumed_as_uninterrupted, ddp_as_alone, fsdp_as_alone, generates_as_on_the_cpu,
    )
}  # fmt: skip


# Parts


class _Stop(Exception):  # noqa: N818
    """Raised in the middle of a run, as if it were killed."""


def _losses(
    config: ModelConfig,
    device: torch.device,
    steps: int,
    folder: Path | None = None,
    *,
    world: World | None = None,
    stop_after: int | None = None,
    precision: str = "float32",
    compile: bool = False,
    strategy: str = "ddp",
    optimizer: str = "adamw",
    every: int = 10**9,
) -> list[float]:
    """Of steps of 8 sequences in two micro-batches, with a third of the weights at zero."""
    length = 256
    settings = TrainSettings(
        steps=steps,
        batch=BatchSettings(tokens_per_step=8 * length, sequence_length=length, micro_batch=4),
        optim=OptimSettings(name=optimizer, lr=5e-4),
        schedule=ScheduleSettings(warmup_steps=2),
        compute=ComputeSettings(precision=precision, compile=compile, strategy=strategy),
        checkpoint=CheckpointSettings(every=every, asynchronous=True),
    )
    generator = np.random.default_rng(0)
    tokens = generator.integers(3, config.vocab_size, 20 * 8 * length, dtype=np.uint16)
    tokens[1::2] = tokens[::2]  # something to learn
    losses = list[float]()

    def on_record(record: dict[str, Any]) -> None:
        losses.append(record["loss"])
        if len(losses) == stop_after:
            raise _Stop

    with tempfile.TemporaryDirectory() as other:
        try:
            outcome: Outcome = train(
                _model(config, device), PackedLoader(tokens, length, 8, 0), settings, folder or Path(other),
                on_record=on_record, world=world or World(device=device),
            )  # fmt: skip
        except _Stop as stop:
            if notes := getattr(stop, "__notes__", ()):  # of what failed in the background meanwhile
                raise RuntimeError("; ".join(notes)) from stop
        else:
            if outcome.stopped:
                raise RuntimeError(f"a signal ({outcome.stopped}) ended the run after step {outcome.steps}")
    return losses


def _model(config: ModelConfig, device: torch.device) -> MobileLLM:
    """The same weights on every device."""
    return MobileLLM(config, torch.Generator().manual_seed(0)).to(device)


def _apart(ours: Sequence[float], theirs: Sequence[float]) -> float:
    if len(ours) != len(theirs):
        raise RuntimeError(f"{len(ours)} losses to compare with {len(theirs)}: a run began at another step")
    return max(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """‖ours − theirs‖ / ‖theirs‖."""
    return float((ours - theirs).double().norm() / theirs.double().norm())


def _held(difference: float, bar: float) -> Result:
    return {"passed": difference <= bar, "relative_difference": difference, "bar": bar}
