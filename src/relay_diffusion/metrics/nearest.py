"""Nearest neighbours among points that come batch by batch, each in several views (as it is, mirrored); torch only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 2**24  # of the queries in float64 at once: 128 MiB


class Neighbours(NamedTuple):
    """Of each query by rank [Q,K]: Euclidean distance (float64), position of the neighbour, whether its second view."""

    distances: Tensor
    positions: Tensor
    mirrored: Tensor


def squared_distances(queries: Tensor, points: Tensor) -> Tensor:
    """|q - p|^2 [Q,P] of queries [Q,D] and points [P,D], float64.

    As |q|^2 + |p|^2 - 2 q.p: exact for 8-bit values, whose sums are integers below 2^53; otherwise to about 1e-14 of
    |q|^2 + |p|^2, so that equal points may be a millionth of their norm apart.
    """
    points = points.double()
    norms = points.square().sum(1)
    blocks = []
    for block in queries.split(max(1, BLOCK_ELEMENTS // queries.shape[1])):
        rows = block.double()
        blocks.append(torch.addmm(norms, rows, points.T, alpha=-2) + rows.square().sum(1, keepdim=True))
    return torch.cat(blocks).clamp_(min=0)


class NearestSearch:
    """The nearest points of all queries [Q,...], of points that come batch by batch; none of them is kept.

    nearest: K, how many. own [Q]: position of the point that a query is itself, which it then does not find in any
    view; -1 for none. A point is found once, in its nearer view; points equally far are found in their order.
    """

    def __init__(self, queries: Tensor, nearest: int, own: Tensor) -> None:
        self.queries, self.nearest, self.own = queries.flatten(1), nearest, own.to(queries.device)
        self.seen = 0
        nothing = queries.new_empty(len(queries), 0)
        self.squares, self.positions, self.mirrored = nothing.double(), nothing.long(), nothing.bool()

    def update(self, views: Tensor) -> None:
        """The next points: [1,B,...] as they are, or [2,B,...] mirrored too."""
        count = views.shape[1]
        squares, view = squared_distances(self.queries, views.flatten(2).flatten(0, 1)).unflatten(1, (-1, count)).min(1)
        positions = torch.arange(self.seen, self.seen + count, device=squares.device)
        squares.masked_fill_(self.own[:, None] == positions, torch.inf)
        self.seen += count
        # Stable, and what was found before comes first: ties do not depend on the batches.
        squares, order = torch.cat([self.squares, squares], 1).sort(dim=1, stable=True)
        best = order[:, : self.nearest]
        self.squares = squares[:, : self.nearest]
        self.positions = torch.cat([self.positions, positions.expand(len(best), -1)], 1).gather(1, best)
        self.mirrored = torch.cat([self.mirrored, view == 1], 1).gather(1, best)

    def compute(self) -> Neighbours:
        """What was found, on the CPU; a rank for which there was no point is infinitely far."""
        return Neighbours(self.squares.sqrt().cpu(), self.positions.cpu(), self.mirrored.cpu())
