"""Nearest neighbors in large sets, from blockwise float64 matrix products.

|q - p|^2 = |q|^2 + |p|^2 - 2 q.p is fast, but loses the digits of points that lie close together far from the origin.
It is computed in float64, which TF32 settings do not affect. `squared_radii` and `covered` subtract the sets' common
mean, bound the error, and decide cases within the bound by differences, which are exactly 0 for equal points.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24  # elements of a block's float64 matrices: 128 MiB
BLOCK_ROWS = 1024
SPARE = 5  # neighbors beyond the k-th to compare by differences
NEGLIGIBLE = 1e-9  # share of a squared radius; float32 features are less precise
TIE = 1 + 1e-14  # equal distances may differ in their last digits, as torch sums pairwise


class Block(NamedTuple):
    """Consecutive queries from `start` and their partial distances to all points.

    rows [B,D]: the queries as given. norms [B]: |q|^2. partial [B,P]: |q - p|^2 - |q|^2, which orders the points.
    """

    start: int
    rows: Tensor
    norms: Tensor
    partial: Tensor


def distance_blocks(queries: Tensor, points: Tensor, norms: Tensor, origin: Tensor | float = 0.0) -> Iterator[Block]:
    """Yield partial squared distances in blocks of bounded memory.

    queries [Q,D] of any dtype, from which `origin` is subtracted here; points [P,D], float64, with it subtracted.
    norms [P]: |p|^2, or another term to add to -2 q.p. |q|^2 + partial is exact for 8-bit values, whose sums are
    integers below 2^53; otherwise accurate to about 1e-14 of |q|^2 + |p|^2.
    """
    size = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // max(points.shape)))
    for start in range(0, len(queries), size):
        rows = queries[start : start + size]
        centered = rows.double() - origin
        yield Block(start, rows, centered.square().sum(1), torch.addmm(norms, centered, points.T, alpha=-2))


def squared_radii(points: Tensor, nearest_k: int, origin: Tensor) -> Tensor:
    """Return each point's squared distance to its k-th nearest other one.

    points [N,D], N > k -> [N] float64. origin [D]: a point near the middle of the sets, for accuracy only.
    """
    centered = points.double() - origin
    norms = centered.square().sum(1)
    bounds = _relative_error(points) * (norms + norms.max())
    candidates = min(nearest_k + SPARE, len(points) - 1)
    radii = []
    for start, rows, row_norms, partial in distance_blocks(points, centered, norms, origin):
        partial.diagonal(start).fill_(torch.inf)  # exclude the point itself but not its duplicates
        values, nearest = partial.topk(candidates, largest=False)
        exact = (rows.double()[:, None] - points[nearest].double()).square().sum(2)
        radius = exact.kthvalue(nearest_k, dim=1).values
        least_of_others = (values.amax(1) + row_norms - bounds[start : start + len(rows)]).clamp(min=0)
        for row in (radius * (1 - NEGLIGIBLE) > least_of_others).nonzero().flatten().tolist():
            squares = _exact_squares(points[start + row], points)
            squares[start + row] = torch.inf
            radius[row] = squares.kthvalue(nearest_k).values
        radii.append(radius)
    return torch.cat(radii)


def _exact_squares(point: Tensor, points: Tensor) -> Tensor:
    """Squared distances [N] of a point [D] to points [N,D], from differences."""
    return torch.cat([(part.double() - point.double()).square().sum(1) for part in points.split(BLOCK_ROWS)])


def covered(points: Tensor, centers: Tensor, squared_radius: Tensor, origin: Tensor) -> Tensor:
    """Return which points lie within the radius of at least one center.

    points [N,D], centers [M,D], squared_radius [M] -> bool [N]. A point on the edge counts as inside.
    """
    middle = centers.double() - origin
    norms = middle.square().sum(1)
    offsets, largest = norms - squared_radius, norms.max() + squared_radius.max()
    relative = _relative_error(points)
    inside = []
    for _, rows, norm, excess in distance_blocks(points, middle, offsets, origin):  # |p - c|^2 - r^2, less |p|^2
        bound = relative * (norm + largest)
        lowest = excess.amin(1) + norm
        found = lowest <= -bound
        for row in (~found & (lowest <= bound)).nonzero().flatten().tolist():
            found[row] = (_exact_squares(rows[row], centers) <= squared_radius * TIE).any()
        inside.append(found)
    return torch.cat(inside)


def _relative_error(points: Tensor) -> float:
    """Bound the error of |a|^2 + |b|^2 - 2 a.b.

    The bound is relative to |a|^2 + |b|^2 and valid for any order of summation.
    """
    return (points.shape[1] + 16) * torch.finfo(torch.float64).eps


class Neighbours(NamedTuple):
    """Neighbors of each query by rank, [Q,K] each.

    distances: Euclidean, float64. positions: of the neighbors. mirrored: whether the second view is the nearer one.
    """

    distances: Tensor
    positions: Tensor
    mirrored: Tensor


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """Squared distances of queries [Q,D] to points [P,D]: float64 [Q,P].

    Computed as in `distance_blocks`.
    """
    points = points.double()
    blocks = distance_blocks(queries, points, points.square().sum(1))
    return torch.cat([block.partial + block.norms[:, None] for block in blocks]).clamp_(min=0)


class NearestSearch:
    """Nearest points of queries [Q,...] in a stream of points.

    Points are not kept. nearest: number K of neighbors. own [Q]: position of the query itself among the points,
    excluded in every view; -1: none. A point is found once, in its nearer view; equally distant points are found in
    their order.
    """

    def __init__(self, queries: Tensor, nearest: int, own: Tensor) -> None:
        self.queries, self.nearest, self.own = queries.flatten(1), nearest, own.to(queries.device)
        self.seen = 0
        nothing = queries.new_empty(len(queries), 0)
        self.squares, self.positions, self.mirrored = nothing.double(), nothing.long(), nothing.bool()

    def update(self, views: Tensor) -> None:
        """Add the next points: [1,B,...], or [2,B,...] with their mirrored views."""
        count = views.shape[1]
        squares, view = squared_distances(self.queries, views.flatten(2).flatten(0, 1)).unflatten(1, (-1, count)).min(1)
        positions = torch.arange(self.seen, self.seen + count, device=squares.device)
        squares.masked_fill_(self.own[:, None] == positions, torch.inf)
        self.seen += count
        # A stable sort with earlier points first: ties do not depend on the batches.
        squares, order = torch.cat([self.squares, squares], 1).sort(dim=1, stable=True)
        best = order[:, : self.nearest]
        self.squares = squares[:, : self.nearest]
        self.positions = torch.cat([self.positions, positions.expand(len(best), -1)], 1).gather(1, best)
        self.mirrored = torch.cat([self.mirrored, view == 1], 1).gather(1, best)

    def compute(self) -> Neighbours:
        """Return the neighbors on the CPU; a missing neighbor has infinite distance."""
        return Neighbours(self.squares.sqrt().cpu(), self.positions.cpu(), self.mirrored.cpu())
