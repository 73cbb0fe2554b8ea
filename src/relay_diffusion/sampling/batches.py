"""What a prediction runs through: batches of a plan or of images that exist, dealt out to the devices; and its results.

Every image is dealt to one device. Every device needs at least one: Lightning lets a device without a batch leave
early, and the others would wait for it. So where there are too few images, some are dealt to several devices, which
make the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import cycle, islice
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from relay_diffusion.data.image_sets import ImageSet
from relay_diffusion.models.relay import SampleBatch, Samples
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


def dealing_order(todo: Sequence[int], shown: int, devices: int) -> list[int]:
    """`todo` in an order in which every device gets an image, and the first device the first `shown` first.

    Where there are too few, some come again.
    """
    count = max(len(todo), devices, (shown - 1) * devices + 1)
    repeated = list(islice(cycle(todo), count))
    first, others = iter(repeated[:shown]), iter(repeated[shown:])
    turns = (first if k % devices == 0 and k // devices < shown else others for k in range(count))
    return [next(turn) for turn in turns]


class StoredBatch(NamedTuple):
    """positions [B] in the set, images uint8 [B,3,H,W]."""

    positions: Tensor
    images: Tensor


class _Share(IterableDataset[StoredBatch]):
    """One device's images, in batches."""

    def __init__(self, images: ImageSet, positions: list[int], batch_size: int) -> None:
        self.images, self.positions, self.batch_size = images, positions, batch_size

    def __iter__(self) -> Iterator[StoredBatch]:
        first = 0
        for batch in self.images.batches(self.batch_size, self.positions):
            yield StoredBatch(torch.tensor(self.positions[first : first + len(batch)]), batch)
            first += len(batch)


class StoredDataModule(L.LightningDataModule):
    """The images of a set."""

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        super().__init__()
        self.images, self.batch_size = images, batch_size

    def predict_dataloader(self) -> DataLoader[StoredBatch]:
        """This device's share."""
        assert self.trainer is not None
        mine = list(range(len(self.images)))[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(_Share(self.images, mine, self.batch_size), batch_size=None)


class StoredImages(L.LightningModule):
    """In the place of a relay, for images that exist: predicts what it is given, so that callbacks can measure it."""

    def predict_step(self, batch: StoredBatch, batch_idx: int) -> Samples:  # noqa: ARG002
        """(positions, images) -> Samples without stages."""
        return Samples(batch.positions, batch.images, {})
