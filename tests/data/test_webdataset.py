"""data=webdataset: samples, labels, captions, and errors."""

from __future__ import annotations

from pathlib import Path

import pytest

from formats_on_disk import write_shards
from pictures_on_disk import encoded, pixels, pngs, write_tar
from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.webdataset import WebDatasetFormat
from relay_diffusion.errors import UserError

IMAGES = list(pngs([f"{number}.png" for number in range(6)]).values())
PNG, JPEG = IMAGES[0], encoded(pixels(7), "JPEG")


def opened(path: Path, subset: str = "", **options: object) -> ImageDataset:
    return ImageDataset(path, 8, subset, format=WebDatasetFormat(**options))  # type: ignore[arg-type]


def refused(path: Path, message: str, **options: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(path, **options)
    assert "\n" not in str(caught.value)


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    dataset = opened(write_shards(tmp_path / "set", IMAGES, [0, 1, 2, 0, 1, 2], ["a", "b", "", "d", "e\nf", "g"]))
    assert (dataset.names[0], dataset.names[-1]) == ("shard-000.tar/000.png", "shard-001.tar/005.png")
    assert (dataset.labels, dataset.class_names) == ([0, 1, 2, 0, 1, 2], ["0", "1", "2"])
    assert dataset.captions == [["a"], ["b"], [], ["d"], ["e", "f"], ["g"]]
    assert [dataset._set._source.read(name) for name in dataset.names] == IMAGES


def test_one_shard_is_enough(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"x/b.png": PNG, "x/a.JPG": JPEG, "x/b.cls": b"1\n", "x/a.CLS": b"0"})
    dataset = opened(path)
    assert (dataset.names, dataset.labels) == (["a.tar/x/b.png", "a.tar/x/a.JPG"], [1, 0])


def test_equal_names_in_two_shards_are_two_samples(tmp_path: Path) -> None:
    for shard in ("train/0.tar", "train/1.tar", "val/0.tar"):
        (tmp_path / shard).parent.mkdir(exist_ok=True)
        write_tar(tmp_path / shard, {"000.png": PNG})
    assert opened(tmp_path).names == ["train/0.tar/000.png", "train/1.tar/000.png", "val/0.tar/000.png"]
    assert opened(tmp_path, subset="val").names == ["val/0.tar/000.png"]


def test_the_extension_begins_at_the_first_dot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": PNG, "0.mask.png": JPEG, "0.json": b"{}", "1.v2.png": PNG})
    assert opened(path).names == ["a.tar/0.png"]
    assert "ignored 3 files of other types (.json, .png): a.tar/0.mask.png" in capsys.readouterr().out
    masks = opened(path, image_extensions=["mask.png"])
    assert masks.names == ["a.tar/0.mask.png"]


def test_two_images_of_a_sample_are_refused(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": PNG, "1.png": PNG, "1.jpg": JPEG})
    refused(path, r"the sample 'a\.tar/1' has several images; set data\.dataset\.format\.image_extensions")
    assert opened(path, image_extensions=["png"]).names == ["a.tar/0.png", "a.tar/1.png"]


def test_samples_without_labels_and_captions(tmp_path: Path) -> None:
    dataset = opened(write_shards(tmp_path / "none", IMAGES))
    assert (dataset.num_classes, dataset.labels, dataset.captions) == (0, [-1] * 6, [[]] * 6)
    message = r"^text: .* has no members \.txt; use text=none, or data\.dataset\.format\.caption_extension$"
    with pytest.raises(UserError, match=message):
        ImageDataModule(dataset, 2, captions=True)
    some = write_shards(tmp_path / "some", IMAGES, [0, 1, None, 0, 1, 0])
    refused(some, r": its members \.cls and \.txt: \"labels\" has no entry for 'shard-000\.tar/002\.png'")


def test_other_extensions_of_labels_and_captions(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", {"0.png": PNG, "0.target": b"2", "0.caption": b"a cat"})
    dataset = opened(path, label_extension="target", caption_extension="caption")
    assert (dataset.labels, dataset.captions) == ([2], [["a cat"]])


@pytest.mark.parametrize("text", [b"cat", b"-1", b"1.5", b"", b"1 2", "²".encode(), b"9" * 5000])
def test_a_class_that_is_no_number_is_named(tmp_path: Path, text: bytes) -> None:
    refused(write_tar(tmp_path / "a.tar", {"0.png": PNG, "0.cls": text}), r"^data\.dataset\.path: 'a\.tar/0\.cls' in ")
    assert len(ImageDataset(tmp_path / "a.tar", 8, labels=False, format=WebDatasetFormat())) == 1


def test_a_folder_without_shards(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(PNG)
    refused(tmp_path, r"holds no \.tar file")
