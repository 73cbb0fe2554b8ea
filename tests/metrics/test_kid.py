"""KID: formula, torchmetrics, blocks, a set with itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchmetrics.image.kid import poly_mmd

from relay_diffusion.errors import UserError
from relay_diffusion.metrics import kid
from relay_diffusion.metrics.kid import kernel_distance


def kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x.double() @ y.double() / len(x) + 1) ** 3


def test_kid_equals_the_formula() -> None:
    real, fake = torch.randn(7, 4), torch.randn(5, 4) + 0.3
    within_real = torch.stack([kernel(a, b) for i, a in enumerate(real) for j, b in enumerate(real) if i != j])
    within_fake = torch.stack([kernel(a, b) for i, a in enumerate(fake) for j, b in enumerate(fake) if i != j])
    between = torch.stack([kernel(a, b) for a in real for b in fake])
    expected = within_real.mean() + within_fake.mean() - 2 * between.mean()
    torch.testing.assert_close(kernel_distance(real, fake), expected)


def test_kid_agrees_with_torchmetrics() -> None:
    real, fake = torch.randn(40, 16).double(), torch.rand(40, 16).double()
    torch.testing.assert_close(kernel_distance(real, fake), poly_mmd(real, fake), rtol=1e-10, atol=0)


def test_blocks_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = torch.randn(40, 8), torch.rand(33, 8)
    whole = kernel_distance(real, fake)
    assert torch.equal(kernel_distance(real, fake), whole), "deterministic"
    monkeypatch.setattr(kid, "BLOCK_ELEMENTS", 100)
    torch.testing.assert_close(kernel_distance(real, fake), whole, rtol=1e-12, atol=0)


def test_kid_of_a_set_with_itself_is_slightly_negative() -> None:
    """Pairs k(x, x) count between the sets only: -2/N (mean k(x, x) - mean k(x, y))."""
    x = torch.randn(200, 16)
    kernels = (x.double() @ x.double().T / 16 + 1) ** 3
    own = kernels.diagonal().mean()
    others = (kernels.sum() - kernels.diagonal().sum()) / (200 * 199)
    got = kernel_distance(x, x)
    torch.testing.assert_close(got, -2 / 200 * (own - others), rtol=1e-9, atol=0)
    assert -0.2 < got < 0
    assert kernel_distance(x, torch.randn(300, 16)).abs() < 0.1 < kernel_distance(x, x + 0.5)


def test_kid_needs_two_images_per_side() -> None:
    for real, fake, side in ((1, 5, "real"), (5, 1, "generated")):
        with pytest.raises(UserError, match=f"at least 2 {side} images, not 1"):
            kernel_distance(torch.randn(real, 3), torch.randn(fake, 3))
