"""The device a run would train on, told or not."""

from __future__ import annotations

import pytest
import torch

from mobilellm.train.device import measured_flops, this_device


def test_this_machine() -> None:
    """Peaks differ from moment to moment on a busy machine, but not by a thousand times."""
    device = this_device("float32", seconds=0.05)
    assert device.memory_bytes is not None
    assert device.memory_bytes > 10**8
    assert 1e8 < device.peak_flops < 1e16
    assert measured_flops(torch.float32, torch.device("cpu"), 0.0) > 1e8


def test_the_one_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine with a GPU, which is taken by default."""
    with pytest.raises(
        ValueError, match=r"device = 'cuda' cannot be used \(torch finds no GPU here\); use cpu"
    ):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        this_device("float32", 0.0, "cuda")
    with pytest.raises(ValueError, match="device = 'tpu' cannot be trained on; choose cpu or cuda"):
        this_device("float32", 0.0, "tpu")
    asked, card = list[str](), "NVIDIA H100 80GB HBM3"
    properties = type("Properties", (), {"total_memory": 80 * 10**9})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: asked.append(str(place)) or card)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda place: properties)
    for kind in (None, "cuda"):
        device = this_device("float32", 0.0, kind)
        assert (device.name, device.is_gpu) == (card, True)
        assert (device.memory_bytes, device.peak_flops) == (80 * 10**9, 989e12)
    assert this_device("float32", 0.0, "cuda:1").is_gpu
    assert asked == ["cuda", "cuda", "cuda:1"]
    device = this_device("float32", 0.0, "cpu")
    assert not device.is_gpu
    threads = torch.get_num_threads()
    assert device.name == f"CPU, {threads} thread{'s' * (threads > 1)}"
