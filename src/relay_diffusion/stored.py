"""Images that exist already, in the place of a relay: they pass through the same callbacks to be measured."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from relay_diffusion.data.image_sets import ImageSet
from relay_diffusion.relay import Samples


class StoredBatch(NamedTuple):
    """positions [B] in the set, images uint8 [B,3,H,W]."""

    positions: Tensor
    images: Tensor


class StoredImages(L.LightningModule):
    """Predicts what it is given."""

    def predict_step(self, batch: StoredBatch, batch_idx: int) -> Samples:  # noqa: ARG002
        """(positions, images) -> Samples without stages."""
        return Samples(batch.positions, batch.images, {})


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
    """The images of a set dealt out to the devices in turn: each once."""

    def __init__(self, images: ImageSet, batch_size: int) -> None:
        super().__init__()
        self.images, self.batch_size = images, batch_size

    def predict_dataloader(self) -> DataLoader[StoredBatch]:
        """This device's share."""
        assert self.trainer is not None
        mine = list(range(len(self.images)))[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(_Share(self.images, mine, self.batch_size), batch_size=None)
