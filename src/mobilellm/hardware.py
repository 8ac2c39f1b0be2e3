"""What accelerators can do at most, by their short name and by the name the driver gives."""

from __future__ import annotations

import re

PEAK_TFLOPS = {
    "a100": 312.0,
    "h100": 989.0,  # SXM
    "h100-pcie": 756.0,
    "h200": 989.0,  # SXM
    "b200": 2250.0,
    "l4": 121.0,
    "l40s": 362.0,
    "rtx3090": 71.0,
    "rtx4090": 165.0,
    "mi300x": 1307.0,
}
"""Dense bf16 matrix TFLOP/s with fp32 accumulation, without sparsity: the makers' data sheets."""

MEMORY_GB = {
    "a100": 80,  # there is one of 40, too
    "h100": 80,
    "h100-pcie": 80,
    "h200": 141,
    "b200": 180,
    "l4": 24,
    "l40s": 48,
    "rtx3090": 24,
    "rtx4090": 24,
    "mi300x": 192,
}
"""Memory by the same data sheets, in 10^9 bytes."""

_MAKERS_WORDS = frozenset({"nvidia", "amd", "instinct", "tesla", "geforce", "graphics"})
_CHIPS = {
    ("a100",): "a100",
    ("h100",): "h100",
    ("h100", "pcie"): "h100-pcie",
    ("h200",): "h200",
    ("b200",): "b200",
    ("l4",): "l4",
    ("l40s",): "l40s",
    ("rtx", "3090"): "rtx3090",
    ("rtx", "4090"): "rtx4090",
    ("mi300x",): "mi300x",
    ("a100", "pcie"): "a100",  # the same peak as SXM's, at less power
}
_MEMORY_OR_SOCKET = re.compile(r"[0-9]+gb|hbm[0-9]e?|sxm[0-9]?|oam|vf")
"""Words after the chip that say how much memory it has or how it is mounted, and nothing of its speed."""


def hardware_name(device_name: str) -> str | None:
    """The key in PEAK_TFLOPS of a device as `torch.cuda.get_device_name()` calls it, or None.

    "NVIDIA A100-SXM4-80GB" is a100, "NVIDIA H100 PCIe" h100-pcie. A word that is not known (MIG, NVL, Laptop,
    Ti, D) may mean a slower part, so the answer is None rather than a guess.
    """
    words = [word for word in re.split(r"[^a-z0-9]+", device_name.lower()) if word]
    chip = tuple(
        word for word in words if word not in _MAKERS_WORDS and not _MEMORY_OR_SOCKET.fullmatch(word)
    )
    return _CHIPS.get(chip)


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of one device by the name torch reports; None where it is not known."""
    name = hardware_name(device_name)
    return None if name is None else PEAK_TFLOPS[name] * 1e12


def named_peak_flops(name: str) -> float:
    """Dense bf16 FLOP/s of hardware by its short name, in any case. Raises ValueError listing the known."""
    if name.lower() not in PEAK_TFLOPS:
        raise ValueError(f"hardware {name!r} is not known; choose one of {', '.join(PEAK_TFLOPS)}")
    return PEAK_TFLOPS[name.lower()] * 1e12
