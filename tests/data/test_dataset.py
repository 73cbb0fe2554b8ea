from __future__ import annotations

import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from pictures_on_disk import encoded, pixels, pngs, write_folder, write_tar, write_zip
from relay_diffusion.data.convert import Classes, ConvertOptions, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.decode import decode_rgb
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.diffusion.pixels import to_float, to_uint8
from relay_diffusion.errors import UserError

NAMES = ["heldout/d.png", "train/a.png", "train/b.png", "train/c.png"]
LABELS = {"labels": [["heldout/d.png", 0], ["train/a.png", 1], ["train/b.png", 0], ["train/c.png", 2]]}


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "images.zip", pngs(NAMES), LABELS)


def single(tmp_path: Path, data: bytes, name: str = "a.png") -> Path:
    return write_zip(tmp_path / "single.zip", {name: data})


def only_pixel(path: Path) -> list[int]:
    """The color at the top left of the only image."""
    return ImageDataset(path, 4)[0][0][:, 0, 0].tolist()


# --- conversion


def test_every_byte_survives_the_round_trip() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    floats = to_float(every)
    assert floats.dtype == torch.float32
    assert (floats.min().item(), floats.max().item()) == (-1.0, 1.0)
    assert torch.equal(to_uint8(floats), every)
    assert torch.equal(to_uint8(floats.double()), every)


def test_to_uint8_truncates_and_clamps() -> None:
    x = torch.tensor([-5.0, -1.0, 0.0, 1.0, 5.0, -1.0 + 0.49 / 127.5, -1.0 + 0.51 / 127.5])
    assert to_uint8(x).tolist() == [0, 0, 128, 255, 255, 0, 1]


def test_to_float_keeps_float32_and_refuses_other_types() -> None:
    images = torch.tensor([-1.0, 0.3])
    assert to_float(images) is images
    for dtype in (torch.float64, torch.int16):
        with pytest.raises(AssertionError, match="uint8"):
            to_float(torch.zeros(1, dtype=dtype))


# --- order, labels, subsets, flips


def test_items_follow_the_sorted_names(archive: Path) -> None:
    dataset = ImageDataset(archive, 8)
    assert dataset.names == NAMES
    assert dataset.class_names == ["0", "1", "2"]
    assert dataset.num_classes == 3
    for index, label in enumerate([0, 1, 0, 2]):
        image, found = dataset[index]
        assert image.dtype == torch.uint8
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels(index))
        assert found == label


def test_folder_and_zip_agree(archive: Path, tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path / "folder", {**pngs(NAMES), ".hidden/x.png": b"", "__MACOSX/y.png": b"", "t.txt": b""}
    )
    ours, theirs = ImageDataset(folder, 8), ImageDataset(archive, 8, labels=False)
    assert ours.names == theirs.names
    assert [label for _, label in ours] == [-1] * 4
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(ours, theirs, strict=True))


def test_subset_keeps_the_classes_of_the_whole(archive: Path) -> None:
    heldout = ImageDataset(archive, 8, subset="heldout")
    assert heldout.names == ["heldout/d.png"]
    assert heldout.num_classes == 3


def test_class_names_come_from_the_file(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", pngs(NAMES), LABELS | {"classes": ["x", "y", "z"]})
    assert ImageDataset(path, 8).class_names == ["x", "y", "z"]
    assert ImageDataset(path, 8, labels=False).num_classes == 0


def test_null_labels_are_no_labels(tmp_path: Path) -> None:
    assert ImageDataset(write_zip(tmp_path / "a.zip", pngs(NAMES), {"labels": None}), 8)[0][1] == -1


@pytest.mark.parametrize("cache", [False, True])
def test_the_second_half_of_the_indices_is_mirrored(archive: Path, cache: bool) -> None:
    plain, flipped = ImageDataset(archive, 8), ImageDataset(archive, 8, x_flip=True, cache=cache)
    assert len(flipped) == 8
    for index in range(4):
        assert torch.equal(flipped[index][0], plain[index][0])
        assert torch.equal(flipped[index + 4][0], plain[index][0].flip(2))
        assert flipped[index + 4][1] == plain[index][1]
    with pytest.raises(IndexError):
        flipped[8]


def test_cache_changes_nothing_and_reports_progress_once(archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain, cached = (ImageDataset(archive, 4, x_flip=True, cache=cache) for cache in (False, True))
    order = [7, 0, 3, 3, 4]
    (images, labels), (cached_images, cached_labels) = plain.batch(order), cached.batch(order)
    assert torch.equal(images, cached_images)
    assert torch.equal(images, torch.stack([plain[index][0] for index in order]))
    assert labels.tolist() == cached_labels.tolist() == [plain[index][1] for index in order]
    archive.unlink()
    assert torch.equal(cached[1][0], plain_image(cached, 1))
    assert capsys.readouterr().out.count("decoding images: 4/4") == 1


def plain_image(dataset: ImageDataset, index: int) -> torch.Tensor:
    """Box average of the original pixels, by hand."""
    height, width = dataset.size
    blocks = pixels(index).reshape(height, 2, width, 2, 3).astype(int).sum((1, 3))
    return torch.from_numpy(((blocks + 2) // 4).astype(np.uint8)).permute(2, 0, 1)


def test_forked_workers_read_what_the_parent_reads(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "many.zip", pngs([f"{index:03}.png" for index in range(64)], side=32))
    dataset = ImageDataset(path, 32)  # has read the first image: the parent's handle is open
    loader = DataLoader(dataset, batch_size=4, num_workers=2)
    read = torch.cat([images for images, _ in loader])
    expected = np.stack([pixels(index, 32) for index in range(64)])
    np.testing.assert_array_equal(read.permute(0, 2, 3, 1).numpy(), expected)


def test_pickles_for_spawned_workers(archive: Path) -> None:
    dataset = ImageDataset(archive, 8)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[2][0], dataset[2][0])


# --- resolution


def test_rectangles_are_read_cached_averaged_and_mirrored(tmp_path: Path) -> None:
    stored = [pixels(index, 8)[:4] for index in range(2)]  # 4 high, 8 wide
    archive = write_zip(tmp_path / "images.zip", {f"{index}.png": encoded(one) for index, one in enumerate(stored)})
    whole, cached = (ImageDataset(archive, [4, 8], x_flip=True, cache=cache) for cache in (False, True))
    for dataset in (whole, cached):
        for index, one in enumerate(stored):
            expected = torch.from_numpy(one.copy()).permute(2, 0, 1)
            assert torch.equal(dataset[index][0], expected)
            assert torch.equal(dataset[index + 2][0], expected.flip(-1))
    halved = ImageDataset(archive, [2, 4])
    assert halved[0][0].shape == (3, 2, 4)
    assert len({dataset.source_hash for dataset in (whole, cached, halved)}) == 2
    for resolution, wanted in (([8, 4], "4x8"), (4, "4x4"), ([4, 4], "4x4")):
        with pytest.raises(UserError, match=f"is 8x4; it must be {wanted} or a whole multiple"):
            ImageDataset(archive, resolution)


@pytest.mark.parametrize("factor", [2, 3, 4, 5, 7])
def test_box_average_is_the_rounded_mean(tmp_path: Path, factor: int) -> None:
    stored = pixels(1, 6 * factor)
    image, _ = ImageDataset(single(tmp_path, encoded(stored)), 6)[0]
    mean = stored.reshape(6, factor, 6, factor, 3).astype(np.float64).mean((1, 3))
    np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), np.floor(mean + 0.5 + 1e-9))


@pytest.mark.parametrize("size", [(8, 6), (6, 6), (2, 2), (4, 8)])
def test_wrong_size_names_the_image_and_both_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    path = single(tmp_path, encoded(Image.new("RGB", size)))
    found = f"{size[0]}x{size[1]}; it must be 4x4 or a whole multiple; .*convert"
    with pytest.raises(UserError, match=rf"^data\.dataset\.path: 'a.png' in .*single.zip is {found}"):
        ImageDataset(path, 4)


# --- decoding


def test_transparency_is_composited_on_white(tmp_path: Path) -> None:
    half = Image.new("RGBA", (4, 4), (255, 0, 0, 51))
    assert only_pixel(single(tmp_path, encoded(half))) == [255, 204, 204]
    assert only_pixel(single(tmp_path, encoded(half, "WEBP", lossless=True), "a.webp")) == [255, 204, 204]
    assert only_pixel(single(tmp_path, encoded(Image.new("LA", (4, 4), (0, 51))))) == [204, 204, 204]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert only_pixel(single(tmp_path, encoded(palette))) == [40, 50, 60]
    assert only_pixel(single(tmp_path, encoded(palette, transparency=b"\xff\x00"))) == [255, 255, 255]
    assert (
        only_pixel(single(tmp_path, encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3)))) == [255] * 3
    )


def test_gray_sixteen_bit_and_cmyk(tmp_path: Path) -> None:
    assert only_pixel(single(tmp_path, encoded(Image.new("L", (4, 4), 77)))) == [77] * 3
    assert only_pixel(single(tmp_path, encoded(Image.new("1", (4, 4), 1)))) == [255] * 3
    assert only_pixel(single(tmp_path, encoded(np.full((4, 4), 0x4D12, np.uint16)))) == [0x4D] * 3
    cmyk = encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "JPEG", quality=100)
    red, green, blue = only_pixel(single(tmp_path, cmyk, "a.JPEG"))
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize(
    "data", [b"", b"no image", encoded(pixels(0, 64))[:500], encoded(Image.new("RGB", (9, 9)), "GIF")]
)
def test_broken_image_is_named(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(UserError, match=r"'a.png' in .*single.zip (is not a PNG|cannot be decoded)") as caught:
        ImageDataset(single(tmp_path, data), 64)
    assert "\n" not in str(caught.value)


def test_damaged_zip_member_is_named(tmp_path: Path) -> None:
    path = single(tmp_path, encoded(pixels(0)))
    damaged = bytearray(path.read_bytes())
    damaged[60] ^= 0xFF
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"'a.png' in .*single.zip cannot be read: .*CRC"):
        ImageDataset(path, 8)


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = single(tmp_path, encoded(pixels(0)))
    monkeypatch.setattr("relay_diffusion.data.decode.MAX_PIXELS", 63)
    with pytest.raises(UserError, match=r"'a.png' in .*decompression bomb"):
        ImageDataset(path, 8)


def test_decoding_keeps_every_pixel() -> None:
    np.testing.assert_array_equal(np.array(decode_rgb(encoded(pixels(3)), "a.png")), pixels(3))
    with pytest.raises(UserError, match=r"^gone\.png is not a PNG"):
        decode_rgb(b"hello", "gone.png")


# --- paths


def test_a_missing_path_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.dataset\.path=.*gone\.zip: no such file or folder"):
        ImageDataset(tmp_path / "gone.zip", 8)


def test_one_image_file_is_a_set(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "one.JPEG").write_bytes(encoded(pixels(5)))  # the content counts
    dataset = ImageDataset(tmp_path / "one.JPEG", 8)
    assert (dataset.names, dataset.labels, dataset.num_classes) == (["one.JPEG"], [-1], 0)
    np.testing.assert_array_equal(dataset[0][0].permute(1, 2, 0).numpy(), pixels(5))
    before = dataset.source_hash
    (tmp_path / "one.JPEG").write_bytes(encoded(pixels(6)))
    assert ImageDataset(tmp_path / "one.JPEG", 8).source_hash != before
    assert next(open_image_set(tmp_path / "one.JPEG", "images").batches(2)).shape == (1, 3, 8, 8)
    options = ConvertOptions(str(tmp_path / "one.JPEG"), str(tmp_path / "out.zip"), 8, classes=Classes.none)
    assert convert(options).images == 1
    archive.rename(tmp_path / "images.png")  # a zip, whatever its name
    assert ImageDataset(tmp_path / "images.png", 8).names == NAMES
    (tmp_path / "bad.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"^data\.dataset\.path: '/.*bad\.png' is not a PNG") as caught:
        ImageDataset(tmp_path / "bad.png", 8)
    assert "\n" not in str(caught.value)


def test_tar_and_cut_zip_point_to_the_converter(archive: Path, tmp_path: Path) -> None:
    archive.write_bytes(archive.read_bytes()[:-30])
    tar, gif = write_tar(tmp_path / "images.tar", pngs(NAMES)), tmp_path / "a.gif"
    Image.new("RGB", (8, 8)).save(gif)
    for path, problem in ((archive, "not a zip, or cut short"), (tar, "neither an image .* nor"), (gif, "neither an")):
        with pytest.raises(UserError, match=rf"data\.dataset\.path=.*{problem}.*convert") as caught:
            ImageDataset(path, 8)
        assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "images"
    path.write_text("no zip")

    def refused(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(UserError, match=r"data\.dataset\.path=.*not a zip, or cut short"):
        ImageDataset(path, 8)


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "folder", write_zip(tmp_path / "a.zip", {"notes.txt": b""})):
        with pytest.raises(UserError, match=r"data\.dataset\.path=.*holds no image"):
            ImageDataset(path, 8)


def test_unknown_subset_lists_the_available_ones(archive: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.dataset\.path=.*: no images in .* subset='test'; available: heldout, train"
    ):
        ImageDataset(archive, 8, subset="test")
    with pytest.raises(UserError, match="not in folders"):
        ImageDataset(single(tmp_path, encoded(pixels(0))), 8, subset="train")


@pytest.mark.parametrize("name", ["/etc/a.png", "../a.png", "x/../../a.png", "..\\a.png", "C:\\a.png"])
def test_hostile_member_names_are_refused(tmp_path: Path, name: str) -> None:
    path = write_zip(tmp_path / "a.zip", {name: encoded(pixels(0))})
    with pytest.raises(UserError, match=r"data\.dataset\.path=.*absolute or leaves the archive"):
        ImageDataset(path, 8)


# --- dataset.json


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("{", "dataset.json is not valid JSON"),
        ("[]", 'must be an object with the key "labels"'),
        ({"labels": {"a": 1}}, '"labels" must be a list'),
        ({"labels": [["train/a.png", 1.5]]}, r"labels[0] = ['train/a.png', 1.5] must be [name, class index]"),
        ({"labels": [["train/a.png", True]]}, "labels[0] = ['train/a.png', True]"),
        ({"labels": [["gone.png", 0]]}, "labels[0] is for 'gone.png', which is not among the images"),
        ({"labels": LABELS["labels"][:3]}, "\"labels\" has no entry for 'train/c.png'"),
        ({"labels": [["train/a.png", -1]]}, "labels[0], 'train/a.png': class -1 must be 0..999999"),
        ({"labels": LABELS["labels"] * 2}, "labels[4] repeats 'heldout/d.png'; remove one entry"),
        ({**LABELS, "classes": ["x", "y"]}, "'train/c.png': class 2 must be 0..1"),
        ({**LABELS, "classes": "xyz"}, '"classes" must be a list of class names'),
    ],
)
def test_malformed_labels_are_named(tmp_path: Path, dataset: object, message: str) -> None:
    path = write_zip(tmp_path / "a.zip", pngs(NAMES), dataset)
    with pytest.raises(UserError, match=rf"data\.dataset\.path=.*dataset\.json.*{re.escape(message)[-20:]}") as caught:
        ImageDataset(path, 8)
    assert message in str(caught.value)
