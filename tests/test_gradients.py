"""Gradients that are not finite."""

import pytest
import torch

from relay_diffusion.gradients import _walkable, replace_nonfinite
from support import TRITON

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_nonfinite_gradients_become_finite_and_are_counted():
    parameter = torch.nn.Parameter(torch.zeros(5))
    parameter.grad = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), -2.0])
    assert int(replace_nonfinite([parameter])) == 3
    assert parameter.grad.tolist() == [1.0, 0.0, 1e5, -1e5, -2.0]


def test_the_kernel_does_the_same(monkeypatch):
    """Across the ends of programs and tensors, in any memory format; without a GPU in Triton's interpreter."""
    pytest.importorskip("triton", TRITON)
    from relay_diffusion.kernels import nonfinite

    monkeypatch.setattr(nonfinite, "BLOCK", 64)
    monkeypatch.setattr(nonfinite, "CHUNK", 128)
    nonfinite._work.cache_clear()
    tensors = [torch.randn(shape, device=DEVICE) for shape in ((300,), (1,), (128,), (4, 8, 3, 3))]
    tensors[3] = tensors[3].to(memory_format=torch.channels_last)
    tensors[0][[0, 127, 128, 299]] = torch.tensor([torch.nan, torch.inf, -torch.inf, torch.nan], device=DEVICE)
    tensors[1][0] = torch.inf
    tensors[2][5] = -3.4e38
    tensors[3][1, 2, 0, 1] = -torch.inf
    expected = [torch.nan_to_num(tensor, nan=0.0, posinf=1e5, neginf=-1e5) for tensor in tensors]
    assert nonfinite.replace_all(tensors, 1e5).item() == 6
    for got, right in zip(tensors, expected, strict=True):
        assert torch.equal(got, right)
    assert nonfinite.replace_all(tensors, 1e5).item() == 0
    nonfinite._work.cache_clear()


def test_what_the_kernel_may_walk_over():
    x = torch.randn(4, 8, 3, 3)
    assert _walkable(x)
    assert _walkable(x.to(memory_format=torch.channels_last))
    assert _walkable(torch.randn(5))
    assert not _walkable(x.double())
    assert not _walkable(x[:, ::2])
    assert not _walkable(torch.randn(4, 6).T)


def test_no_gradients_are_none_replaced():
    assert int(replace_nonfinite([torch.nn.Parameter(torch.zeros(2))])) == 0
