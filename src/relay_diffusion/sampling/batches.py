"""Batches of a plan, split over the devices.

Every image is dealt to one device. Every device needs at least one: Lightning lets a device without a batch leave
early, and the others would wait for it. So where there are too few images, some are dealt to several devices, which
make the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice

import lightning as L
import torch
from torch.utils.data import DataLoader

from relay_diffusion.models.relay import SampleBatch
from relay_diffusion.sampling.plan import Plan


class PlanDataModule(L.LightningDataModule):
    """The images of a plan that are still to be made.

    todo: positions in the plan. batch_size: images at once on one device. A device's last batch is filled up, as the
    last bit of an image depends on how many are computed with it: so a continued run, or one on other devices, makes
    the same files.
    """

    def __init__(self, plan: Plan, todo: Sequence[int], batch_size: int) -> None:
        super().__init__()
        self.plan, self.todo, self.batch_size = plan, list(todo), batch_size

    def predict_dataloader(self) -> DataLoader[int]:
        """This device's share."""
        assert self.trainer is not None
        mine = self.todo[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=self.batch_size, collate_fn=self._batch)  # type: ignore[arg-type]

    def _batch(self, positions: Iterable[int]) -> SampleBatch:
        positions, plan = list(positions), self.plan
        size = min(self.batch_size, len(plan.names))
        filled = positions + positions[-1:] * (size - len(positions))
        seeds = [plan.seeds[position] for position in filled]
        labels = [plan.labels[position] for position in filled]
        start = None
        if plan.start is not None:
            start = torch.stack([image for image, _ in plan.start.__getitems__(seeds)])
        return SampleBatch(torch.tensor(positions), torch.tensor(seeds), torch.tensor(labels), start)


def rank_order(todo: Sequence[int], shown: int, devices: int) -> list[int]:
    """`todo` in an order in which every device gets an image, and the first device the first `shown` first.

    Where there are too few, some come again.
    """
    count = max(len(todo), devices, (shown - 1) * devices + 1)
    repeated = list(islice(cycle(todo), count))
    first, others = iter(repeated[:shown]), iter(repeated[shown:])
    turns = (first if k % devices == 0 and k // devices < shown else others for k in range(count))
    return [next(turn) for turn in turns]
