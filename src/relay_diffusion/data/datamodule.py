"""Training batches in a reproducible, resumable order.

The order depends only on the seed and the number of images seen.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from lightning import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from relay_diffusion.data.dataset import ImageDataset, batch_of
from relay_diffusion.data.image_sets import evenly_spaced
from relay_diffusion.diffusion.generators import mix_seeds
from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.errors import UserError
from relay_diffusion.text import CachedEncoder, TextEncoder
from relay_diffusion.utils.distributed import SIGNALS, exit_for_parent_only


def micro_batch_size(batch_size: int, world_size: int, accumulate: int = 1) -> int:
    """Return the images per device and forward pass.

    Raises UserError unless `batch_size` divides evenly.
    """
    if accumulate < 1:
        raise UserError(f"trainer.accumulate_grad_batches={accumulate}: must be at least 1")
    parts = world_size * accumulate
    if batch_size < 1 or batch_size % parts:
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        works = f"{below} or {above}" if below > 0 else f"{above}"
        raise UserError(
            f"data.batch_size={batch_size} does not divide evenly by {parts} "
            f"(devices x nodes = {world_size}, trainer.accumulate_grad_batches = {accumulate}); {works} would work"
        )
    return batch_size // parts


class InfiniteSampler(Sampler[list[int]]):
    """Endless micro-batches of dataset indices for one rank.

    Resumable at any number of images seen. Position p of the stream belongs to epoch p // length and is entry p %
    length of a permutation drawn from (seed, epoch): a pure function of (seed, p). Training step t takes
    stream[start + t B : start + (t + 1) B], B = `batch_size`, cut into accumulate x world_size equal slices:
    micro-batch m of rank r is slice m * world_size + r. So the images of a step are the same for any number of devices.

    length: items in the dataset. start: images seen so far, or a function that returns them, called at every `iter`.
    Raises UserError unless B divides evenly and the seed is at least 0.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        accumulate: int = 1,
        start: int | Callable[[], int] = 0,
    ) -> None:
        if seed < 0:
            raise UserError(f"data.seed={seed}: must be 0 or more")
        assert length > 0, "an empty dataset has no stream"
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.length, self.batch_size, self.seed = length, batch_size, seed
        self.rank, self.world_size, self.accumulate, self.start = rank, world_size, accumulate, start
        self.micro_batch_size = micro_batch_size(batch_size, world_size, accumulate)
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def __iter__(self) -> Iterator[list[int]]:
        for positions in self.positions():
            yield self.stream(positions.start, len(positions))

    def positions(self) -> Iterator[range]:
        """Yield the positions in the stream of this rank's micro-batches."""
        first = self.start() if callable(self.start) else self.start
        while True:
            for micro_step in range(self.accumulate):
                part = micro_step * self.world_size + self.rank
                begin = first + part * self.micro_batch_size
                yield range(begin, begin + self.micro_batch_size)
            first += self.batch_size

    def stream(self, first: int, count: int) -> list[int]:
        """Return the dataset indices at positions first .. first + count - 1."""
        indices: list[int] = []
        while len(indices) < count:
            epoch, offset = divmod(first + len(indices), self.length)
            if epoch != self._epoch:
                self._epoch = epoch
                self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.length)
            indices += self._permutation[offset : offset + count - len(indices)].tolist()
        return indices


def chosen_caption(captions: Sequence[str], seed: int, position: int) -> str:
    """Choose one caption of an image for one visit; "" without captions.

    position: of the visit in the stream of `InfiniteSampler`. A pure function of its arguments: the choice depends on
    no rank, worker or interruption. All captions are equally probable.
    """
    return captions[mix_seeds(seed, position) % len(captions)] if captions else ""


def evenly_spaced_captions(dataset: ImageDataset, numbers: Sequence[int], count: int) -> list[str]:
    """Return one caption of each of evenly spaced images.

    numbers: which of `count` evenly spaced images. "" for an image without captions. The choice depends on the number
    alone.
    """
    chosen = evenly_spaced(count, len(dataset.names))
    return [chosen_caption(dataset.captions[chosen[number]], 0, number) for number in numbers]


class ImageDataModule(LightningDataModule):
    """Endless training batches of an image dataset.

    Each batch is (uint8 or float32 [b, C, H, W], int64 [b]) with b = batch_size / (devices x nodes x
    accumulate_grad_batches of the Trainer); `batch_size` counts the images of a step over all devices. num_workers:
    decoding processes per device; 0 is enough for a cached dataset. seed: determines the order. captions: a third part
    of each batch is the list of b prompts, one caption of each image, chosen at every visit (`chosen_caption`). text:
    an encoder, with which the third part is the encoded prompts instead, TextStates of float16 and b rows; encode all
    captions first with `text.prepare`. It becomes a CachedEncoder with the folder `text_cache`. The order continues at
    `images_seen` of the trained LightningModule. Raises UserError unless the batch divides evenly, and with `captions`
    or `text` for a dataset without captions.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        batch_size: int,
        num_workers: int = 2,
        seed: int = 0,
        captions: bool = False,
        text: TextEncoder | None = None,
        text_cache: str | Path = "outputs/text_cache",
    ) -> None:
        super().__init__()
        if num_workers < 0:
            raise UserError(f"data.num_workers={num_workers}: must be 0 or more")
        self.dataset, self.batch_size, self.num_workers, self.seed = dataset, batch_size, num_workers, seed
        self.text = None if text is None else CachedEncoder(text, text_cache)
        self.captions = captions or text is not None
        if self.captions and self.missing_captions == len(dataset.names):
            problem = getattr(dataset, "no_captions", "has no captions; use text=none")  # not of other datasets
            raise UserError(f"text: {dataset.path} {problem}")

    @property
    def missing_captions(self) -> int:
        """Number of images without a caption, whose prompt is ""."""
        return sum(not captions for captions in self.dataset.captions)

    def train_dataloader(self) -> DataLoader[Any]:
        """Return the loader of this rank.

        Lightning must not replace its sampler (Trainer(use_distributed_sampler=False)).
        """
        trainer = self.trainer
        assert trainer is not None, "train_dataloader needs an attached Trainer"
        self.dataset.load(show_progress=trainer.global_rank == 0)
        num_workers = 0 if self.dataset.cache else self.num_workers
        sampler = InfiniteSampler(
            len(self.dataset),
            self.batch_size,
            seed=self.seed,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulate=trainer.accumulate_grad_batches,
            start=lambda: cast(int, trainer.lightning_module.images_seen),
        )
        return _TrainingLoader(
            _CaptionedBatches(self.dataset, self.seed, self.text) if self.captions else _Batches(self.dataset),
            batch_size=None,  # an item is a whole batch
            sampler=_Visits(sampler) if self.captions else sampler,
            num_workers=num_workers,
            worker_init_fn=exit_for_parent_only,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )


class _Batches(Dataset[tuple[Tensor, Tensor]]):
    """Batches of a dataset by lists of indices.

    Collating single items costs a small network more time than indexing the cached images.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        return batch_of(self.dataset, indices)


class _Visits(Sampler[tuple[int, list[int]]]):
    """Micro-batches of a sampler with the position of their first item."""

    def __init__(self, order: InfiniteSampler) -> None:
        self.order = order

    def __iter__(self) -> Iterator[tuple[int, list[int]]]:
        for positions in self.order.positions():
            yield positions.start, self.order.stream(positions.start, len(positions))


class _CaptionedBatches(Dataset[tuple[Tensor, Tensor, list[str] | TextStates]]):
    """Batches of a dataset with prompts, by (first position, indices).

    text: looks up the encoded prompts, in the process that decodes the images.
    """

    def __init__(self, dataset: ImageDataset, seed: int, text: CachedEncoder | None) -> None:
        self.dataset, self.seed, self.text = dataset, seed, text

    def __getitem__(self, visit: tuple[int, list[int]]) -> tuple[Tensor, Tensor, list[str] | TextStates]:
        first, indices = visit
        captions = (self.dataset.captions[self.dataset.image_of(index)] for index in indices)
        prompts = [chosen_caption(some, self.seed, position) for position, some in enumerate(captions, first)]
        return *batch_of(self.dataset, indices), prompts if self.text is None else self.text.lookup(prompts)


class _TrainingLoader(DataLoader[Any]):
    """Data loader whose workers ignore the signals that stop a run.

    A closed terminal, `timeout` and `scancel` signal every process of a run, and the step that training then finishes
    still needs its images. Workers inherit the blocked signals, so they cannot be stopped during their start either.
    """

    def __iter__(self) -> Any:
        """Start the workers while signals to this process are blocked."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
