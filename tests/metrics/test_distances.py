"""Blockwise precision and recall agree with brute force."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from relay_diffusion.metrics import neighbours as distances
from relay_diffusion.metrics.neighbours import covered, squared_radii
from relay_diffusion.metrics.precision_recall import precision_recall


def naive(real: Tensor, fake: Tensor, nearest_k: int) -> tuple[float, float]:
    """Compute precision and recall from float64 differences of pairs."""

    def squared(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.array([[((x - y) ** 2).sum() for y in b] for x in a])

    a, b = real.double().numpy(), fake.double().numpy()
    between = squared(a, b)
    # the (k+1)-th smallest with the point itself, whose distance is 0
    real_radii = np.sort(squared(a, a), axis=1)[:, nearest_k]
    fake_radii = np.sort(squared(b, b), axis=1)[:, nearest_k]
    precision = (between <= real_radii[:, None]).any(0).mean()
    recall = (between <= fake_radii[None]).any(1).mean()
    return float(precision), float(recall)


def plain(g: torch.Generator, n: int) -> Tensor:
    return torch.randn(n, 5, generator=g)


def offset(g: torch.Generator, n: int) -> Tensor:
    return torch.randn(n, 5, generator=g) + 3e4


def two_far_clusters(g: torch.Generator, n: int) -> Tensor:
    """Draw points far from their mean, to cancel digits in distances."""
    side = 2.0 * torch.randint(0, 2, (n, 1), generator=g) - 1
    return 4e6 * side + torch.randint(-3, 4, (n, 5), generator=g)


def lattice(g: torch.Generator, n: int) -> Tensor:
    """Make many equal points and equal distances."""
    return torch.randint(0, 3, (n, 3), generator=g).float() + 0.1


def repeated(g: torch.Generator, n: int) -> Tensor:
    """Simulate a generator that has collapsed to a few images."""
    few = torch.randn(4, 40, generator=torch.Generator().manual_seed(7))
    return few[torch.randint(0, 4, (n,), generator=g)] * 100


def outlier(g: torch.Generator, n: int) -> Tensor:
    x = torch.randn(n, 5, generator=g)
    x[0] = 1e9
    return x


KINDS = (plain, offset, two_far_clusters, lattice, repeated, outlier)


@pytest.fixture(params=[(7, 64), (1024, 2**24)], ids=["small blocks", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK_ROWS", request.param[0])
    monkeypatch.setattr(distances, "BLOCK_ELEMENTS", request.param[1])


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("make", KINDS, ids=[make.__name__ for make in KINDS])
@pytest.mark.parametrize("seed", range(4))
def test_precision_recall_agree_with_brute_force(make: Callable[[torch.Generator, int], Tensor], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    k = 1 + seed
    real, fake = make(generator, 23 + seed), make(generator, 31)
    if seed % 2:
        fake[:9] = real[:9]
    result = precision_recall(real, fake, k)
    assert (float(result.precision), float(result.recall)) == naive(real, fake, k)


@pytest.mark.parametrize("make", KINDS, ids=[make.__name__ for make in KINDS])
def test_a_set_covers_itself(make: Callable[[torch.Generator, int], Tensor]) -> None:
    x = make(torch.Generator().manual_seed(0), 60)
    assert precision_recall(x, x.flip(0).clone(), 3) == (1.0, 1.0)
    assert precision_recall(x.repeat(2, 1), x, 3) == (1.0, 1.0)


def test_radii_are_distances_to_the_kth_other_point() -> None:
    x = torch.tensor([[0.0], [1.0], [1.0], [4.0]]) + 1000
    for k, expected in ((1, [1, 0, 0, 9]), (2, [1, 1, 1, 9]), (3, [16, 9, 9, 16])):
        assert squared_radii(x, k, torch.zeros(1)).tolist() == expected


def test_points_on_the_edge_are_inside() -> None:
    """Equal distances may differ in the last digits."""
    values = torch.rand(200)
    points = torch.stack([values[torch.randperm(200)] for _ in range(50)])
    origin = torch.zeros(200)
    for radius in points.double().square().sum(1):
        assert covered(points, origin[None], radius[None], origin).all()
        assert not covered(points * 1.000001, origin[None], radius[None], origin).any()


def test_blocks_bound_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distances, "BLOCK_ELEMENTS", 1000)
    largest = 0
    multiply = torch.addmm

    def spy(*arguments: object, **options: object) -> Tensor:
        nonlocal largest
        result = multiply(*arguments, **options)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(torch, "addmm", spy)
    precision_recall(torch.randn(300, 4), torch.randn(200, 4), 3)
    assert 0 < largest <= 1000
