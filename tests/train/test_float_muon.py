from __future__ import annotations

import pytest
import torch

from mobilellm.train.float_muon import FloatMuon, orthogonalised

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


@pytest.mark.parametrize("shape", [(32, 32), (16, 48), (48, 16)])
def test_steps_are_torchs_within_its_rounding(shape: tuple[int, int]) -> None:
    """torch computes the direction in bfloat16, so it is compared as a direction."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator)
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    options = {"lr": 0.1, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    a, b = FloatMuon([ours], **options), torch.optim.Muon([theirs], **options)
    for _ in range(4):
        gradient = torch.randn(shape, generator=generator)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        a.step()
        b.step()
    moved, expected = ours.detach() - start, theirs.detach() - start
    assert torch.nn.functional.cosine_similarity(moved.flatten(), expected.flatten(), dim=0) > 0.999
    assert moved.norm() == pytest.approx(expected.norm().item(), rel=0.01)
    (mine,), (torchs,) = a.state.values(), b.state.values()
    assert mine.keys() == torchs.keys()
    torch.testing.assert_close(mine["momentum_buffer"], torchs["momentum_buffer"])


def test_all_directions_come_out_alike() -> None:
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))[0]
    matrix = torch.diag(torch.tensor([1.0, 0.3, 0.1, 0.03])) @ turn
    sizes = torch.linalg.svdvals(orthogonalised(matrix, COEFFICIENTS, 5, 1e-7))
    assert sizes.min() > 0.5
    assert sizes.max() < 1.3
