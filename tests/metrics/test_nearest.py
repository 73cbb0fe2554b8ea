"""Nearest neighbors: closed forms, brute force, independence of the batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from relay_diffusion.metrics import neighbours as module
from relay_diffusion.metrics.neighbours import NearestSearch, Neighbours, squared_distances


def images(count: int, seed: int, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=generator)


def search(
    queries: Tensor, points: Tensor, nearest: int, mirrored: bool = True, batch: int = 7, own: Tensor | None = None
) -> Neighbours:
    found = NearestSearch(queries, nearest, torch.full((len(queries),), -1) if own is None else own)
    for part in points.split(batch):
        found.update(torch.stack([part, part.flip(-1)] if mirrored else [part]))
    return found.compute()


def test_distances_by_hand() -> None:
    queries = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    points = torch.tensor([[3.0, 4.0], [0.0, 1.0], [-6.0, 8.0]])
    assert squared_distances(queries, points).tolist() == [[25, 1, 100], [0, 18, 97]]
    found = NearestSearch(queries, 2, torch.tensor([-1, -1]))
    found.update(points[None])
    distances, positions, mirrored = found.compute()
    assert distances.tolist() == [[1, 5], [0, 18**0.5]]
    assert positions.tolist() == [[1, 0], [0, 1]]
    assert not mirrored.any()


def test_8_bit_distances_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = images(9, 1, 64).flatten(1), images(5, 2, 64).flatten(1)
    expected = (a.long()[:, None] - b.long()).square().sum(2)
    assert expected.max() > 2**24  # float32 would not do
    assert torch.equal(squared_distances(a, b), expected.double())
    monkeypatch.setattr(module, "BLOCK_ELEMENTS", 2 * a.shape[1])
    assert torch.equal(squared_distances(a, b), expected.double())


def test_close_floats_far_from_the_origin_are_no_less_than_0() -> None:
    points = torch.rand(40, 2048, generator=torch.Generator().manual_seed(0)) + 1
    squares = squared_distances(points, points)
    assert squares.min() >= 0
    assert squares.diagonal().max() < 1e-10 * points.square().sum(1).max()


@pytest.mark.parametrize("mirrored", [False, True])
def test_agrees_with_brute_force(mirrored: bool) -> None:
    queries, points = images(11, 1), images(37, 2)
    views = [points, points.flip(-1)] if mirrored else [points]
    squares = torch.stack([(queries.long()[:, None] - view.long()).square().sum((2, 3, 4)) for view in views])
    values, positions = squares.amin(0).sort(1)
    found = search(queries, points, 4, mirrored)
    torch.testing.assert_close(found.distances, values[:, :4].double().sqrt(), rtol=1e-15, atol=0)
    assert torch.equal(found.positions, positions[:, :4])
    assert torch.equal(found.mirrored, squares.argmin(0).gather(1, positions)[:, :4] == 1)
    assert bool(found.mirrored.any()) == mirrored


@pytest.mark.parametrize("batch", [1, 3, 36, 37])
def test_neighbors_do_not_depend_on_batches(batch: int) -> None:
    queries, points = images(11, 1), images(18, 2).repeat(2, 1, 1, 1)  # every point twice: ties
    points = torch.cat([points, queries[:1]])
    expected = search(queries, points, 5)
    assert expected.positions[1, 1] == expected.positions[1, 0] + 18
    for one, other in zip(search(queries, points, 5, batch=batch), expected, strict=True):
        assert torch.equal(one, other)


def test_a_copy_and_a_mirrored_copy_are_found() -> None:
    points = images(20, 3)
    queries = torch.stack([points[13], points[4].flip(-1)])
    found = search(queries, points, 1)
    assert found.distances.flatten().tolist() == [0, 0]
    assert found.positions.flatten().tolist() == [13, 4]
    assert found.mirrored.flatten().tolist() == [False, True]
    unmirrored = search(queries, points, 1, mirrored=False)
    assert unmirrored.distances[0] == 0 < unmirrored.distances[1]
    assert not unmirrored.mirrored.any()


def test_a_symmetric_point_is_found_once_and_not_as_mirrored() -> None:
    points = images(5, 4)
    points[2] = torch.maximum(points[2], points[2].flip(-1))
    found = search(points[2:3], points, 5)
    assert found.positions[0, 0] == 2
    assert sorted(found.positions[0].tolist()) == [0, 1, 2, 3, 4]
    assert not found.mirrored[0, 0]


def test_query_excludes_itself_in_every_view() -> None:
    points = images(12, 5)
    points[7], points[9] = points[1], points[3].flip(-1)
    own = torch.arange(12)
    found = search(points, points, 11, own=own)
    assert not (found.positions == own[:, None]).any()
    assert [found.positions[index, 0].item() for index in (1, 7, 3, 9)] == [7, 1, 9, 3]
    assert (found.distances[:, 0] == 0).nonzero().flatten().tolist() == [1, 3, 7, 9]
    assert found.mirrored[[1, 3, 7, 9], 0].tolist() == [False, True, False, True]
