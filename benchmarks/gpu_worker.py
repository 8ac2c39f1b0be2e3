"""Works through the tasks of `gpu.py`, and prints a line of JSON after each. Its stdout is for nothing else.

python benchmarks/gpu_worker.py '{"tasks": [{"kind": "card"}], "device": "cpu", "sequences": 4, "length": 64}'
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import sys
import time
import traceback
from typing import Any

import gpu_attention
import gpu_checks
import gpu_training
import torch
from gpu_training import Shape

DOING = {
    "card": lambda shape, **_: card(shape.device),
    "check": lambda shape, name: gpu_checks.check(name, shape.device),
    "attention": lambda shape, size: gpu_attention.attention(size, shape),
    "train": gpu_training.training,
}


def main() -> None:
    faulthandler.enable()  # a crash in native code says so, on stderr
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not come between
    spec: dict[str, Any] = json.loads(sys.argv[1])
    shape = Shape(torch.device(spec["device"]), spec["sequences"], spec["length"])
    for task in spec["tasks"]:
        result = _done(dict(task), shape)
        print(json.dumps(result), file=lines, flush=True)
        if "CUDA error" in result.get("failed", ""):
            sys.exit(3)  # nothing works in this process any more; another takes the rest
        _clean(shape.device)


def _done(task: dict[str, Any], shape: Shape) -> dict[str, Any]:
    started = time.perf_counter()
    try:
        result: dict[str, Any] = DOING[task.pop("kind")](shape, **task)
    except Exception as error:
        traceback.print_exc()
        result = {"failed": told(error)}
    return result | {"seconds": round(time.perf_counter() - started, 1)}


def told(error: Exception) -> str:
    """In one line, never without a reason: what says nothing is told by its place."""
    text = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
    if not text:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = f"in {place.name}, line {place.lineno} of {os.path.basename(place.filename)}: {place.line}"
    return f"{type(error).__name__}: {text[:400]}"


def card(device: torch.device) -> dict[str, Any]:
    """What it is and does, as a share of which figures can be read."""
    from mobilellm.hardware import peak_flops
    from mobilellm.train.device import measured_flops

    flops = round(measured_flops(torch.bfloat16, device, 1.0) / 1e12, 1)
    if device.type != "cuda":
        return {"name": "CPU", "measured_bf16_tflops": flops}
    torch.empty(1).pin_memory()  # at once and by name, rather than in a thread of every run
    name, properties = torch.cuda.get_device_name(), torch.cuda.get_device_properties(device)
    return {
        "name": name,
        "capability": list(torch.cuda.get_device_capability()),
        "gigabytes": round(properties.total_memory / 2**30, 1),
        "free_gigabytes": round(torch.cuda.mem_get_info()[0] / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": list(torch.cuda.nccl.version()),
        "peak_bf16_tflops": (peak_flops(name) or 0) / 1e12,
        "measured_bf16_tflops": flops,
    }


def _clean(device: torch.device) -> None:
    torch._dynamo.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
