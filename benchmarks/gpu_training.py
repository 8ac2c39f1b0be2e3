"""Steps of training on one device: our real loop, or the Hugging Face Trainer. For workers of `gpu.py`."""

from __future__ import annotations

import contextlib
import gc
import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from our_loop import first_steps
from rival_llama import llama_of

from mobilellm.accounting import training_flops_per_token
from mobilellm.config import ModelConfig
from mobilellm.data.loader import PackedLoader
from mobilellm.hardware import peak_flops
from mobilellm.model import document_mask
from mobilellm.model.transformer import MobileLLM
from mobilellm.presets import preset
from mobilellm.tokenizer import BOS_ID
from mobilellm.train.memory import memory_per_device
from mobilellm.train.recipe import load_recipe
from mobilellm.train.settings import ComputeSettings, OptimSettings

WARM_UP, LEAST, MOST = 2, 3, 6
"""Steps before the measurement, and in it: fewer where they take more than ENOUGH seconds."""
ENOUGH = 4.0
LARGEST = 32
"""Sequences of a micro-batch: no more were ever faster."""
FULL = 0.93
"""Of the memory, for what is planned: workspaces and fragments come on top."""
NO_MEMORY = ("out of memory", "ALLOC_FAILED")
"""Of torch's allocator, and of cuBLAS, which has one of its own."""
MEAN_DOCUMENT = 500
"""Tokens of a document, where they are kept apart."""


class Shape(NamedTuple):
    device: torch.device
    sequences: int
    length: int


def training(
    shape: Shape,
    system: str,
    size: str,
    half: bool = False,
    compile: bool = True,
    checkpointing: bool = False,
    documents: str | None = None,
) -> dict[str, Any]:
    """Tokens/s, MFU and memory with the largest micro-batch that fits, or half of it.

    Our loop compiles on a GPU; `documents` are kept apart by one way of model/document_mask.py.
    """
    config, compile = preset(size), compile and system == "ours" and shape.device.type == "cuda"
    compute = ComputeSettings(compile=compile, activation_checkpointing=checkpointing)
    planned = {micro: _planned(system, size, micro, compute, shape) for micro in _halves(shape.sequences)}
    room = torch.cuda.get_device_properties(shape.device).total_memory * FULL if _on_gpu(shape) else 2**60
    fitting = [micro for micro in planned if planned[micro] < room] or [1]
    if half and len(fitting) == 1:
        return {"left_out": "no smaller micro-batch"}
    too_large: list[int] = []
    for micro in fitting[half:]:
        run = Run(config, micro, compute, documents, shape)
        try:
            seconds = run.ours() if system == "ours" else run.trainer()
        except RuntimeError as error:
            if not any(words in str(error) for words in NO_MEMORY):
                raise
            too_large.append(micro)
        else:
            told = {"micro_batch": micro, "planned_gigabytes": round(planned[micro] / 2**30, 1)}
            return told | ({"did_not_fit": too_large} if too_large else {}) | _figures(run, seconds)
        del run
        gc.collect()  # outside of `except`, whose error holds the tensors
        if _on_gpu(shape):
            torch.cuda.empty_cache()
    return {"failed": "out of memory", "did_not_fit": too_large}


def _on_gpu(shape: Shape) -> bool:
    return shape.device.type == "cuda"


def _halves(sequences: int) -> Iterator[int]:
    micro = min(sequences, LARGEST)
    while micro:
        yield micro
        micro //= 2


def _planned(system: str, size: str, micro: int, compute: ComputeSettings, shape: Shape) -> int:
    """Bytes by `mobilellm train --plan`; the Trainer holds as much, and all logits, twice in float32."""
    recipe = load_recipe("pretrain-125m")
    batch = replace(recipe.batch, sequence_length=shape.length)
    recipe = replace(recipe, batch=batch, compute=compute)
    recomputed = compute.activation_checkpointing
    config = preset(size)
    logits = micro * shape.length * config.vocab_size * 12 if system == "trainer" else 0
    return memory_per_device(recipe, config, 1, micro, recomputed, _on_gpu(shape)).total + logits


def _figures(run: Run, seconds: list[float]) -> dict[str, Any]:
    shape, config = run.shape, run.config
    step = statistics.median(seconds[WARM_UP:])
    rate = shape.sequences * shape.length / step
    out: dict[str, Any] = {
        "tokens_per_second": round(rate),
        "seconds_a_step": [round(each, 4) for each in seconds],
    }
    if run.waited:
        out["share_of_time_for_data"] = round(statistics.median(run.waited[WARM_UP:]) / step, 5)
        out["losses"] = [round(each, 4) for each in run.losses]
    if _on_gpu(shape):
        out["peak_gigabytes"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        if (peak := peak_flops(torch.cuda.get_device_name())) is not None:
            flops = training_flops_per_token(config, shape.length)
            plain = training_flops_per_token(config, shape.length, attention=False)
            out |= {"mfu": round(rate * flops / peak, 3), "mfu_6n": round(rate * plain / peak, 3)}
    return out


class Run:
    """A few steps of one system; seconds of each."""

    def __init__(
        self, config: ModelConfig, micro: int, compute: ComputeSettings, documents: str | None, shape: Shape
    ) -> None:
        self.config, self.micro, self.compute, self.shape = config, micro, compute, shape
        self.documents = documents
        self.waited, self.losses = list[float](), list[float]()
        if _on_gpu(shape):
            torch.cuda.reset_peak_memory_stats()

    def ours(self) -> list[float]:
        sequences, length, device = self.shape.sequences, self.shape.length, self.shape.device
        with device:
            model = MobileLLM(self.config, torch.Generator(device).manual_seed(0))
        generator = np.random.default_rng(0)
        count = sequences * length * (WARM_UP + MOST)
        tokens = generator.integers(3, self.config.vocab_size, count, dtype=np.uint16)
        tokens[generator.random(count) < 1 / MEAN_DOCUMENT] = BOS_ID
        loader = PackedLoader(tokens, length, sequences, 0, document_mask=self.documents is not None)
        seconds = list[float]()

        def on_record(record: dict[str, Any]) -> bool:
            seconds.append(record["seconds"])
            self.waited.append(record["data_seconds"])
            self.losses.append(record["loss"])
            return _enough(seconds)

        way = contextlib.nullcontext() if self.documents is None else _only(self.documents)
        with way:
            first_steps(
                model, loader, WARM_UP + MOST, sequences, length, OptimSettings(), self.compute, on_record,
                self.micro,
            )  # fmt: skip
        return seconds

    def trainer(self) -> list[float]:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        sequences, length = self.shape.sequences, self.shape.length
        on_gpu = _on_gpu(self.shape)
        seconds, started = list[float](), list[float]()

        class Ticking(TrainerCallback):  # type: ignore[misc]
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                started.append(time.perf_counter())

            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if on_gpu:
                    torch.cuda.synchronize()
                started.append(time.perf_counter())
                seconds[:] = [later - earlier for earlier, later in itertools.pairwise(started)]
                control.should_training_stop = _enough(seconds)

        shape = (sequences * (WARM_UP + MOST), length)
        generator = np.random.default_rng(0)
        rows = torch.from_numpy(generator.integers(3, self.config.vocab_size, shape, dtype=np.int64))
        with self.shape.device:
            model = llama_of(self.config)
        with tempfile.TemporaryDirectory() as folder:
            Trainer(
                model=model,
                args=TrainingArguments(
                    folder,
                    max_steps=WARM_UP + MOST,
                    per_device_train_batch_size=self.micro,
                    gradient_accumulation_steps=max(1, sequences // self.micro),
                    lr_scheduler_type="constant",
                    optim="adamw_torch_fused",
                    bf16=True,
                    use_cpu=not on_gpu,
                    logging_strategy="no",
                    save_strategy="no",
                    report_to=[],
                    disable_tqdm=True,
                ),
                train_dataset=[{"input_ids": row, "labels": row} for row in rows],
                callbacks=[Ticking()],
            ).train()
        return seconds


def _enough(seconds: list[float]) -> bool:
    measured = seconds[WARM_UP:]
    return len(measured) >= MOST or (len(measured) >= LEAST and sum(measured) > ENOUGH)


@contextlib.contextmanager
def _only(way: str) -> Iterator[None]:
    """Documents are kept apart by this way, or not at all: RuntimeError where it does not work."""
    if way != "dense" and not document_mask.works(way, torch.device("cuda", 0)):
        raise RuntimeError(f"{way} does not work on this GPU")
    with ways_tried(() if way == "dense" else (way,)):
        yield


@contextlib.contextmanager
def ways_tried(ways: Sequence[str]) -> Iterator[None]:
    """Of model/document_mask.py these alone, or the dense mask."""
    before, document_mask.WAYS = document_mask.WAYS, tuple(ways)
    try:
        yield
    finally:
        document_mask.WAYS = before
