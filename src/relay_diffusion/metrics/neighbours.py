"""Nearest neighbours in large sets of features: exact answers from blockwise matrix products.

|a - b|^2 = |a|^2 + |b|^2 - 2 a.b is fast, but loses the digits of points that lie close together far from the origin.
So it is taken in float64 (which TF32 settings do not touch) from the sets' common mean, with a bound on its error; what
the bound leaves open is settled by differences, which are exactly 0 for equal points. Of the matrix of distances no
more than a block is in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24  # of the matrix of distances at once: 128 MiB
BLOCK_ROWS = 1024
SPARE = 5  # neighbours beyond the k-th that are compared by differences
NEGLIGIBLE = 1e-9  # of a squared radius; features are float32 and know less
TIE = 1 + 1e-14  # the same distance of other points may differ in its last digits; sums are taken pairwise


def squared_radii(points: Tensor, nearest_k: int, origin: Tensor) -> Tensor:
    """Squared distance [N] (float64) of each of the points [N,D] to its k-th nearest other one, N > k.

    origin [D]: a point near the middle of the sets, for accuracy alone.
    """
    centred = points.double() - origin
    norms = centred.square().sum(1)
    bounds = _relative_error(points) * (norms + norms.max())
    candidates = min(nearest_k + SPARE, len(points) - 1)
    radii = []
    for start, rows in _blocks(points, len(points)):
        here = slice(start, start + len(rows))
        surrogate = torch.addmm(norms, centred[here], centred.T, alpha=-2)  # the row's own norm changes no order
        surrogate.diagonal(start).fill_(torch.inf)  # not the point itself; an equal one does count
        values, nearest = surrogate.topk(candidates, largest=False)
        exact = (rows.double()[:, None] - points[nearest].double()).square().sum(2)
        radius = exact.kthvalue(nearest_k, dim=1).values
        least_of_others = (values.amax(1) + norms[here] - bounds[here]).clamp(min=0)
        for row in (radius * (1 - NEGLIGIBLE) > least_of_others).nonzero().flatten().tolist():
            radius[row] = _exact_radius(points, start + row, nearest_k)
        radii.append(radius)
    return torch.cat(radii)


def _exact_radius(points: Tensor, index: int, nearest_k: int) -> Tensor:
    point = points[index].double()
    squares = torch.cat([(part.double() - point).square().sum(1) for part in points.split(BLOCK_ROWS)])
    squares[index] = torch.inf
    return squares.kthvalue(nearest_k).values


def covered(points: Tensor, centres: Tensor, squared_radius: Tensor, origin: Tensor) -> Tensor:
    """Which points [N,D] lie within the (squared) radius [M] of at least one of the centres [M,D]: bool [N].

    A point on the edge counts as inside.
    """
    middle = centres.double() - origin
    norms = middle.square().sum(1)
    offsets, largest = norms - squared_radius, norms.max() + squared_radius.max()
    relative = _relative_error(points)
    inside = []
    for _, rows in _blocks(points, len(centres)):
        centred = rows.double() - origin
        norm = centred.square().sum(1)
        excess = torch.addmm(offsets, centred, middle.T, alpha=-2)  # |a - b|^2 - r^2, less |a|^2
        bound = relative * (norm + largest)
        lowest = excess.amin(1) + norm
        found = lowest <= -bound
        open_rows = (~found & (lowest <= bound)).nonzero().flatten()
        if len(open_rows):
            limits = (bound - norm)[open_rows]
            found[open_rows] = _settle(rows[open_rows], excess[open_rows], limits, centres, squared_radius)
        inside.append(found)
    return torch.cat(inside)


def _settle(points: Tensor, excess: Tensor, limits: Tensor, centres: Tensor, squared_radius: Tensor) -> Tensor:
    """`covered` for a few points by differences: for each one the likeliest centre first, up to its limit [R]."""
    inside = torch.zeros(len(points), dtype=torch.bool, device=points.device)
    while True:
        value, centre = excess.min(1)
        rows = (~inside & (value <= limits)).nonzero().flatten()
        if not len(rows):
            return inside
        centre = centre[rows]
        exact = (points[rows].double() - centres[centre].double()).square().sum(1)
        inside[rows] = exact <= squared_radius[centre] * TIE
        excess[rows, centre] = torch.inf


def _relative_error(points: Tensor) -> float:
    """Bound for |a|^2 + |b|^2 - 2 a.b as a share of |a|^2 + |b|^2, in whatever order the D products are summed."""
    return (points.shape[1] + 16) * torch.finfo(torch.float64).eps


def _blocks(points: Tensor, columns: int) -> list[tuple[int, Tensor]]:
    size = max(1, min(BLOCK_ROWS, BLOCK_ELEMENTS // columns))
    return [(start, points[start : start + size]) for start in range(0, len(points), size)]
