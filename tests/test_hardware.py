"""A device's name as the driver gives it leads to its data sheet's peak, or to none: never to a wrong one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mobilellm.hardware import MEMORY_GB, PEAK_TFLOPS, hardware_name, named_peak_flops, peak_flops


@pytest.mark.parametrize(
    ("reported", "name", "tflops"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100", 312),
        ("NVIDIA A100-SXM4-80GB", "a100", 312),
        ("NVIDIA A100-PCIE-40GB", "a100", 312),
        ("NVIDIA A100 80GB PCIe", "a100", 312),
        ("A100-SXM4-40GB", "a100", 312),
        ("NVIDIA H100 80GB HBM3", "h100", 989),
        ("NVIDIA H100 PCIe", "h100-pcie", 756),
        ("NVIDIA H200", "h200", 989),
        ("NVIDIA B200", "b200", 2250),
        ("NVIDIA L4", "l4", 121),
        ("NVIDIA L40S", "l40s", 362),
        ("NVIDIA GeForce RTX 3090", "rtx3090", 71),
        ("NVIDIA GeForce RTX 4090", "rtx4090", 165),
        ("AMD Instinct MI300X", "mi300x", 1307),
        ("AMD Instinct MI300X OAM", "mi300x", 1307),
    ],
)
def test_names_that_drivers_give(reported: str, name: str, tflops: float) -> None:
    assert hardware_name(reported) == name
    assert peak_flops(reported) == tflops * 1e12


@pytest.mark.parametrize(
    "reported",
    [
        "NVIDIA A10G", "NVIDIA A10", "NVIDIA A100X", "NVIDIA A800-SXM4-80GB", "NVIDIA H20", "NVIDIA H800",
        "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA GH200 480GB", "NVIDIA GB200", "NVIDIA B200A",
        "NVIDIA L40", "NVIDIA L4 L40S", "NVIDIA GeForce RTX 3090 Ti", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA H100 80GB HBM3 MIG 3g.40gb", "AMD Instinct MI300A", "Tesla V100-SXM2-32GB", "Tesla T4",
        "cpu", "AMD EPYC 9575F 64-Core Processor", "", "NVIDIA", "3090",
    ],
)  # fmt: skip
def test_what_only_looks_alike_has_no_peak(reported: str) -> None:
    assert hardware_name(reported) is None
    assert peak_flops(reported) is None


def test_every_entry_is_found_by_its_own_name() -> None:
    for name in PEAK_TFLOPS:
        spelled = name.replace("rtx", "RTX ")
        assert hardware_name(f"NVIDIA {spelled}") == name
        assert named_peak_flops(name.upper()) == PEAK_TFLOPS[name] * 1e12
    assert MEMORY_GB.keys() == PEAK_TFLOPS.keys()
    with pytest.raises(ValueError, match="hardware 'abacus' is not known; choose one of a100, h100"):
        named_peak_flops("abacus")


@given(st.text())
def test_any_name_is_answered(reported: str) -> None:
    assert hardware_name(reported) in {None, *PEAK_TFLOPS}
