"""The images of a run: one file each, packed on request, continued with their own settings only."""

import json
import zipfile

import pytest
import torch

from relay_diffusion.data import ImageDataset
from relay_diffusion.errors import UserError
from relay_diffusion.image_store import ImageStore

PIXELS = torch.arange(4 * 3 * 8 * 8).reshape(4, 3, 8, 8).to(torch.uint8)
NAMES = ["0/a", "0/b", "1/c", "1/d"]


@pytest.fixture
def store(tmp_path):
    store = ImageStore(tmp_path, {"steps": 5})
    store.begin()
    for name, image in zip(NAMES[:3], PIXELS, strict=False):
        store.write(name, image)
    return store


def test_images_come_back_bit_for_bit(store):
    assert [name in store for name in NAMES] == [True, True, True, False]
    batches = list(store.batches(["1/c", "0/a", "0/b"], batch_size=2))
    assert [len(batch) for batch in batches] == [2, 1]
    assert torch.equal(torch.cat(batches), PIXELS[[2, 0, 1]])


@pytest.mark.usefixtures("store")
def test_other_settings_are_refused(tmp_path):
    assert "0/a" in ImageStore(tmp_path, {"steps": 5})
    with pytest.raises(UserError, match="other settings"):
        ImageStore(tmp_path, {"steps": 6})


def test_packed_images_are_a_data_set_and_can_be_added_to(store, tmp_path):
    store.pack(NAMES[:3], [1, 0, 1], ["dog", "cat"])
    assert not store.folder.exists()
    again = ImageStore(tmp_path, {"steps": 5})
    assert [name in again for name in NAMES] == [True, True, True, False]
    again.begin()
    again.write("1/d", PIXELS[3])
    assert torch.equal(torch.cat(list(again.batches(NAMES, 3))), PIXELS)
    again.pack(["1/d"], [0], ["dog", "cat"])  # only what this run knows of
    dataset = ImageDataset(tmp_path / "images.zip", 8)
    assert dataset.names == [f"{name}.png" for name in NAMES]
    assert dataset.labels == [1, 0, 1, 0]
    assert dataset.class_names == ["dog", "cat"]
    assert torch.equal(torch.stack([image for image, _ in dataset]), PIXELS)


def test_packing_without_classes(store, tmp_path):
    store.pack(NAMES[:3], [-1, -1, -1], None)
    store.begin()
    store.write("1/d", PIXELS[3])
    store.pack(NAMES, [-1] * 4, None)
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
        assert len(archive.namelist()) == 5


def test_a_damaged_zip_is_named(store, tmp_path):
    store.pack(NAMES[:3], [-1] * 3, None)
    store.archive.write_bytes(store.archive.read_bytes()[:100])
    with pytest.raises(UserError, match=r"images\.zip cannot be read"):
        ImageStore(tmp_path, {"steps": 5})
