"""data=huggingface and data=webdataset against a zip of the same images."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from formats_on_disk import contents, other_formats
from pictures_on_disk import pngs, write_zip
from relay_diffusion.config.train import validate_training
from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.sources import SourceFormat
from relay_diffusion.errors import UserError
from relay_diffusion.training.run import sampling_command
from support import TINY, assert_same_weights, tiny_stage, weights_of

pytest.importorskip("datasets")

COUNT = 10
NAMES = [f"{number:03}.png" for number in range(COUNT)]
LABELS = [number % 3 for number in range(COUNT)]
CAPTIONS = [f"picture {number}" for number in range(COUNT)]
FORMATS = ("parquet", "saved", "shards")
Formats = Mapping[str, tuple[Path, SourceFormat]]


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Copies of parquet files do not go to the home directory."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    description = {
        "labels": list(zip(NAMES, LABELS, strict=True)),
        "captions": list(zip(NAMES, CAPTIONS, strict=True)),
    }
    return write_zip(tmp_path_factory.mktemp("zip") / "a.zip", pngs(NAMES, 16), description)


@pytest.fixture(scope="module")
def formats(tmp_path_factory: pytest.TempPathFactory) -> Formats:
    return other_formats(tmp_path_factory.mktemp("formats"), list(pngs(NAMES, 16).values()), LABELS, CAPTIONS)


def batches(dataset: ImageDataset, count: int, seen: int = 0, rank: int = 0, ranks: int = 1, workers: int = 0) -> list:
    """Return the first batches of a rank after `seen` images."""
    data = ImageDataModule(dataset, batch_size=4, num_workers=workers, seed=3, captions=True)
    stage = SimpleNamespace(images_seen=seen)
    data.trainer = cast(
        Any, SimpleNamespace(global_rank=rank, world_size=ranks, accumulate_grad_batches=1, lightning_module=stage)
    )
    return list(islice(data.train_dataloader(), count))


def assert_same(ours: list, theirs: list) -> None:
    for (images, labels, captions), (other_images, other_labels, other_captions) in zip(ours, theirs, strict=True):
        assert torch.equal(images, other_images)
        assert labels.tolist() == other_labels.tolist()
        assert captions == other_captions


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    "options",
    [
        {"resolution": 16, "x_flip": True},
        {"resolution": 8, "cache": True},
        {"resolution": 8, "random_crops": 3},
        {"resolution": 16, "channels": 1, "labels": False},
    ],
)
def test_batches_are_those_of_a_zip(formats: Formats, archive: Path, name: str, options: dict[str, Any]) -> None:
    path, format = formats[name]
    ours, theirs = ImageDataset(path, format=format, **options), ImageDataset(archive, **options)
    assert (ours.class_names, ours.num_classes, ours.captions) == (
        theirs.class_names,
        theirs.num_classes,
        theirs.captions,
    )
    assert_same(batches(ours, 7), batches(theirs, 7))


@pytest.mark.parametrize("name", FORMATS)
def test_a_resumed_run_continues_the_order(formats: Formats, name: str) -> None:
    path, format = formats[name]
    dataset = ImageDataset(path, 16, format=format)
    assert_same(batches(dataset, 4, seen=12), batches(dataset, 7)[3:])


@pytest.mark.parametrize("name", FORMATS)
def test_two_ranks_share_the_images_of_a_step(formats: Formats, name: str) -> None:
    path, format = formats[name]
    dataset = ImageDataset(path, 16, format=format)
    ranks = [batches(dataset, 5, rank=rank, ranks=2) for rank in (0, 1)]
    together = [
        (torch.cat(images), torch.cat(labels), [*first, *second])
        for (images, labels, (first, second)) in (zip(*pair, strict=True) for pair in zip(*ranks, strict=True))
    ]
    assert_same(together, batches(dataset, 5))
    captions = [caption for *_, some in together for caption in some]
    assert sorted(captions[:COUNT]) == sorted(CAPTIONS)  # an epoch without duplicates


@pytest.mark.parametrize("name", FORMATS)
def test_workers_read_what_the_main_process_reads(formats: Formats, name: str) -> None:
    path, format = formats[name]
    dataset = ImageDataset(path, 16, format=format)
    assert_same(batches(dataset, 4, workers=2), batches(dataset, 4))


@pytest.mark.slow
def test_training_and_its_continuation_equal_those_on_a_zip(fit, small_zip, tmp_path, capsys):
    images = contents(small_zip)
    paths = other_formats(tmp_path / "formats", images, [number % 2 for number in range(24)], [""] * 24)
    parquet = ["data=huggingface", f"data.dataset.path={paths['parquet'][0]}", "data.dataset.format.label_column=label"]
    shards = ["data=webdataset", f"data.dataset.path={paths['shards'][0]}"]
    fit("zip", 16, "data=folder")
    fit("parquet", 8, *parquet)
    fit("parquet", 16, *parquet)
    fit("shards", 16, *shards)
    expected, *others = (weights_of(tmp_path / run / "checkpoints/last.ckpt") for run in ("zip", "parquet", "shards"))
    for weights in others:
        assert_same_weights(weights, expected)
    assert capsys.readouterr().out.count("24 images of 2 classes") == 4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["data=huggingface", "+data.dataset.format.imagecolumn=x"],
            r"^data\.dataset\.format\.imagecolumn=x: .*HuggingFaceFormat has no such option",
        ),
        (
            ["data=huggingface", "data.dataset.format.split=3.5e1", "data.dataset.format.config=[a]"],
            r"^data\.dataset\.format\.config=\[.*must be a text or null",
        ),
        (
            ["data=webdataset", "data.dataset.format.image_extensions=png"],
            r"^data\.dataset\.format\.image_extensions=png: must be a list",
        ),
        (["data=webdataset", "data.dataset.path=/nowhere"], r"^data\.dataset\.path=/nowhere: no such file or folder"),
    ],
)
def test_invalid_options_are_named_before_anything_is_built(configuration, small_zip, overrides, message):
    with pytest.raises(UserError, match=message):
        validate_training(configuration("train", *TINY, "resolution=16", f"data.dataset.path={small_zip}", *overrides))


def test_sampling_begins_with_other_images(configuration, formats, tmp_path):
    """sample.py reads neither parquet nor shards."""
    path, format = formats["shards"]
    options = ["stage=relay", "stage.corruption.block=2", "data=webdataset", f"data.dataset.path={path}"]
    cfg = configuration("train", *TINY, "resolution=16", f"run_dir={tmp_path}", *options)
    command = sampling_command(cfg, tiny_stage(16, block=2), ImageDataset(path, 16, format=format))
    assert "relay.start=FOLDER " in command
    assert str(path) not in command
