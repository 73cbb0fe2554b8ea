from __future__ import annotations

from itertools import islice
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import Tensor

from pictures_on_disk import pngs, write_zip
from relay_diffusion.data.datamodule import ImageDataModule, InfiniteSampler, micro_batch_size
from relay_diffusion.data.dataset import ImageDataset, batch_of
from relay_diffusion.errors import UserError


def flat(sampler: InfiniteSampler, batches: int) -> list[int]:
    return [index for batch in islice(sampler, batches) for index in batch]


def step(length: int, batch: int, world: int, accumulate: int, number: int, start: int = 0) -> list[int]:
    """Return the indices of one training step over all ranks, in stream order."""
    parts = []
    for micro in range(accumulate):
        for rank in range(world):
            sampler = InfiniteSampler(length, batch, 5, rank, world, accumulate, start)
            parts += list(islice(sampler, number * accumulate + micro, number * accumulate + micro + 1))
    return [index for part in parts for index in part]


@pytest.mark.parametrize(("length", "batch"), [(10, 4), (7, 7), (3, 8), (1, 2)])
def test_every_epoch_is_a_permutation(length: int, batch: int) -> None:
    stream = flat(InfiniteSampler(length, batch, seed=1), 40)
    epochs = [stream[first : first + length] for first in range(0, len(stream) - length, length)]
    assert all(sorted(epoch) == list(range(length)) for epoch in epochs)
    if length == 10:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


def test_order_depends_on_the_seed() -> None:
    assert flat(InfiniteSampler(50, 10, seed=1), 5) == flat(InfiniteSampler(50, 10, seed=1), 5)
    assert flat(InfiniteSampler(50, 10, seed=1), 5) != flat(InfiniteSampler(50, 10, seed=2), 5)


@pytest.mark.parametrize(("world", "accumulate"), [(1, 1), (2, 1), (1, 4), (2, 2), (4, 3), (12, 1)])
def test_ranks_and_parts_together_are_the_stream(world: int, accumulate: int) -> None:
    stream = flat(InfiniteSampler(17, 12, seed=5), 4)
    for number in range(4):
        assert step(17, 12, world, accumulate, number) == stream[12 * number : 12 * (number + 1)]


@pytest.mark.parametrize("start", [0, 12, 13, 40, 12 * 10**9])
def test_start_skips_exactly_that_many_images(start: int) -> None:
    whole = InfiniteSampler(17, 12, seed=5)
    assert flat(InfiniteSampler(17, 12, seed=5, start=start), 3) == whole.stream(start, 36)
    assert step(17, 12, world=3, accumulate=2, number=1, start=start) == whole.stream(start + 12, 12)


def test_start_may_be_a_function_called_at_every_iter() -> None:
    seen = 0
    sampler = InfiniteSampler(17, 4, start=lambda: seen)
    first = next(iter(sampler))
    seen = 4
    assert next(iter(sampler)) == sampler.stream(4, 4) != first


@pytest.mark.parametrize(
    ("batch", "world", "accumulate", "works"), [(50, 8, 2, "48 or 64"), (6, 8, 1, "8 would"), (0, 1, 1, "1 would")]
)
def test_indivisible_batch_names_one_that_works(batch: int, world: int, accumulate: int, works: str) -> None:
    with pytest.raises(UserError, match=rf"data\.batch_size={batch} .*devices x nodes = {world}, .*{works}"):
        micro_batch_size(batch, world, accumulate)


def test_a_negative_seed_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.seed=-1"):
        InfiniteSampler(4, 2, seed=-1)


def test_invalid_options_are_refused(tmp_path: Path) -> None:
    dataset = ImageDataset(write_zip(tmp_path / "a.zip", pngs(["a.png"])), 8)
    with pytest.raises(UserError, match=r"data\.num_workers=-1"):
        ImageDataModule(dataset, 2, num_workers=-1)


class Recorder(L.LightningModule):
    """Stage stand-in that counts images and records its batches."""

    def __init__(self, images_seen: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.images_seen = images_seen
        self.batches: list[tuple[Tensor, Tensor]] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        images, labels = batch
        self.batches.append((images, labels))
        self.images_seen += len(images)
        return self.weight * images.float().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def labels(self) -> list[int]:
        return torch.cat([labels for _, labels in self.batches]).tolist()


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Zip of ten images, labeled by their index."""
    names = [f"{index}.png" for index in range(10)]
    return write_zip(tmp_path / "a.zip", pngs(names), {"labels": [[name, int(name[0])] for name in names]})


def fit(
    data: ImageDataModule, module: Recorder, steps: int, batches_per_epoch: int | None = None, accumulate: int = 1
) -> Recorder:
    trainer = L.Trainer(
        max_steps=steps,
        accumulate_grad_batches=accumulate,
        limit_train_batches=batches_per_epoch,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, datamodule=data)
    return module


# Warnings that are none of this module's making: a deprecated call inside Lightning, its advice on worker counts.
lightning_noise = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*many workers", "ignore:.*srun")


@lightning_noise
@pytest.mark.parametrize(("cache", "workers"), [(True, 2), (False, 0), (False, 2)])
def test_lightning_gets_the_stream(archive: Path, cache: bool, workers: int) -> None:
    dataset = ImageDataset(archive, 8, cache=cache)
    data = ImageDataModule(dataset, batch_size=4, num_workers=workers, seed=3)
    module = fit(data, Recorder(), steps=7)  # 28 images: nearly three epochs, no end of data
    expected = InfiniteSampler(10, 4, seed=3).stream(0, 28)
    assert module.labels() == expected
    images, labels = module.batches[0]
    assert (images.dtype, images.shape, labels.dtype) == (torch.uint8, (4, 3, 8, 8), torch.int64)
    assert torch.equal(images, torch.stack([dataset[index][0] for index in expected[:4]]))
    loader = data.train_dataloader()
    assert (loader.num_workers, loader.persistent_workers) == ((0, False) if cache or not workers else (2, True))


@lightning_noise
def test_the_micro_batches_of_the_trainer_are_cut_from_the_batch(archive: Path) -> None:
    module = fit(ImageDataModule(ImageDataset(archive, 8), batch_size=4, seed=3), Recorder(), steps=3, accumulate=2)
    assert [len(images) for images, _ in module.batches] == [2] * 6
    assert module.labels() == InfiniteSampler(10, 4, seed=3).stream(0, 12)


@lightning_noise
def test_continues_at_images_seen(archive: Path) -> None:
    data = ImageDataModule(ImageDataset(archive, 8, cache=True), batch_size=4)
    whole = fit(data, Recorder(), steps=6).labels()
    assert fit(data, Recorder(images_seen=12), steps=3).labels() == whole[12:]


@lightning_noise
def test_a_new_lightning_epoch_does_not_start_again(archive: Path) -> None:
    data = ImageDataModule(ImageDataset(archive, 8), batch_size=4)
    whole = fit(data, Recorder(), steps=6).labels()
    assert fit(data, Recorder(), steps=6, batches_per_epoch=2).labels() == whole


def test_a_dataset_of_single_items_is_collated(tmp_path: Path) -> None:
    class Items:
        """The items of another dataset, without its batches."""

        def __init__(self, dataset: ImageDataset) -> None:
            self.items = [dataset[index] for index in range(len(dataset))]

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return self.items[index]

    dataset = ImageDataset(write_zip(tmp_path / "images.zip", pngs(["a.png", "b.png", "c.png", "d.png"])), 8)
    images, labels = batch_of(Items(dataset), [3, 0, 3])
    expected_images, expected_labels = dataset.batch([3, 0, 3])
    assert torch.equal(images, expected_images)
    assert labels.tolist() == expected_labels.tolist()
