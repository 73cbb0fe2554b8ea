"""Store images as files or in a zip, and resume."""

import json
import os
import resource
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.image_store import ImageStore

PIXELS = torch.arange(4 * 3 * 8 * 8).reshape(4, 3, 8, 8).to(torch.uint8)
SETTINGS = {"sampler": {"steps": 5, "churn": 0.0}}
NAMES = ["0/a", "0/b", "1/c", "1/d"]


@pytest.fixture
def store(tmp_path):
    store = ImageStore(tmp_path, SETTINGS)
    store.begin()
    for name, image in zip(NAMES[:3], PIXELS, strict=False):
        store.write(name, image)
    return store


def batches(store, names, size):
    return list(store.images(names, (8, 8)).batches(size))


def test_images_are_stored_losslessly(store):
    assert [name in store for name in NAMES] == [True, True, True, False]
    read = batches(store, ["1/c", "0/a", "0/b"], 2)
    assert [len(batch) for batch in read] == [2, 1]
    assert torch.equal(torch.cat(read), PIXELS[[2, 0, 1]])
    assert torch.equal(torch.cat(list(store.images(NAMES[:3], (8, 8)).batches(2, [0, 2]))), PIXELS[[0, 2]])


def test_images_of_a_run_are_not_averaged(store):
    assert store.images(NAMES[:3], (8, 8)).averaging == set()


@pytest.mark.usefixtures("store")
def test_errors_name_the_first_changed_setting(tmp_path):
    assert "0/a" in ImageStore(tmp_path, {"sampler": {"steps": 5, "churn": 0.0}})
    with pytest.raises(UserError, match=r"different settings \(sampler\.steps was 5, is 6\)"):
        ImageStore(tmp_path, {"sampler": {"steps": 6, "churn": 0.0}})
    with pytest.raises(UserError, match=r"different settings \(sampler was .*, is not set\)"):
        ImageStore(tmp_path, {})
    with pytest.raises(UserError, match=r"different settings \(relay was not set, is .*\)"):
        ImageStore(tmp_path, {"relay": {"steps": 5}})
    (tmp_path / "settings.json").write_text('{"classes": null, "text": {"prompts": ["a"]}}')
    with pytest.raises(UserError, match=r"different settings \(class was None, is \[0\]\)"):
        ImageStore(tmp_path, {"classes": [0], "text": {"prompts": ["a"]}})
    with pytest.raises(UserError, match=r"different settings \(prompt was \['a'\], is \['b'\]\)"):
        ImageStore(tmp_path, {"classes": None, "text": {"prompts": ["b"]}})


def test_images_with_classes_are_a_data_set(store, tmp_path):
    store.note_labels({"0/a": 1, "0/b": 0, "1/c": 1}, ["dog", "cat"])
    dataset = ImageDataset(tmp_path / "images", 8)
    assert (dataset.labels, dataset.class_names) == ([1, 0, 1], ["dog", "cat"])
    store.write("1/d", PIXELS[3])
    store.note_labels({"1/d": -1}, ["dog", "cat"])  # one without a class: not a labeled set
    assert ImageDataset(tmp_path / "images", 8).class_names == []


def test_packed_images_are_a_data_set_and_can_be_added_to(store, tmp_path):
    store.note_labels({"0/a": 1, "0/b": 0, "1/c": 1}, ["dog", "cat"])
    store.pack()
    assert not store.folder.exists()
    store.pack()  # nothing left to move
    store.note_labels({"0/a": 1}, ["dog", "cat"])
    assert not store.folder.exists()
    again = ImageStore(tmp_path, SETTINGS)
    assert [name in again for name in NAMES] == [True, True, True, False]
    again.begin()
    again.write("1/d", PIXELS[3])
    assert torch.equal(torch.cat(batches(again, NAMES, 3)), PIXELS)
    again.note_labels({"1/d": 0}, ["dog", "cat"])  # only what this run knows of
    again.pack()
    dataset = ImageDataset(tmp_path / "images.zip", 8)
    assert dataset.names == [f"{name}.png" for name in NAMES]
    assert dataset.labels == [1, 0, 1, 0]
    assert dataset.class_names == ["dog", "cat"]
    assert torch.equal(torch.stack([image for image, _ in dataset]), PIXELS)


def test_the_folder_stays_a_data_set_beside_a_zip(store, tmp_path):
    store.note_labels({"0/a": 1, "0/b": 0, "1/c": 1}, ["dog", "cat"])
    store.pack()
    store.begin()
    store.write("1/d", PIXELS[3])
    store.note_labels({"0/a": 1, "0/b": 0, "1/c": 1, "1/d": 0}, ["dog", "cat"])
    assert ImageDataset(tmp_path / "images", 8).labels == [0]


def test_settings_of_a_run_without_images_may_change(tmp_path):
    ImageStore(tmp_path, SETTINGS).begin()
    ImageStore(tmp_path, {"sampler": {"steps": 6, "churn": float("inf")}}).begin()
    assert "Infinity" not in (tmp_path / "settings.json").read_text()


def test_packing_leaves_no_image_behind(store, tmp_path):
    """Unlabeled images of earlier runs are packed; other files are kept."""
    (store.folder / "mine.txt").write_text("keep me")
    store.write("1/d", PIXELS[3])
    store.note_labels({"1/d": 1}, ["dog", "cat"])
    store.pack()
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        assert json.loads(archive.read("dataset.json")) == {"labels": None}
        assert len(archive.namelist()) == 5
    assert [path.name for path in store.folder.rglob("*")] == ["mine.txt"]


def test_a_damaged_zip_is_named(store, tmp_path):
    store.pack()
    store.archive.write_bytes(store.archive.read_bytes()[:100])
    with pytest.raises(UserError, match=r"images\.zip cannot be read"):
        ImageStore(tmp_path, SETTINGS)


@pytest.mark.usefixtures("store")
def test_damaged_settings_are_named(tmp_path):
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        ImageStore(tmp_path, SETTINGS)


def test_files_of_killed_writers_are_deleted(store, tmp_path):
    """No image is lost if a write is killed."""
    code = "fd5d0b6e5a1c4f0f9f1b2c3d4e5f6a7b"

    def leave():
        left = [store.folder / f"0/.a.png.{code}.tmp", tmp_path / f".images.zip.{code}.tmp"]
        for path in left:
            path.write_bytes(b"half")
        return left

    left = leave()
    (tmp_path / ".mine.tmp").write_text("keep me")
    store.begin()
    assert not any(path.exists() for path in left)
    left = leave()
    store.pack()
    assert not store.folder.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".mine.tmp", "images.zip", "settings.json"]
    (store.folder / "0").mkdir(parents=True)  # killed after the last image was deleted
    store.pack()
    assert not store.folder.exists()


@pytest.mark.parametrize("damage", [slice(0, None), slice(5, None), slice(12, None), slice(-20, None), slice(45, 50)])
def test_images_damaged_by_a_power_failure_are_absent(store, tmp_path, damage, capsys):
    path = store.path("0/b")
    content = bytearray(path.read_bytes())
    content[damage] = b"" if damage.stop is None else bytes(5)  # cut short, or a block that was not written
    path.write_bytes(content)
    assert [name in store for name in NAMES] == [True, False, True, False]
    again = ImageStore(tmp_path, SETTINGS)
    again.pack()
    assert capsys.readouterr().out == "note: damaged images are deleted and not packed: 0/b.png\n"
    with zipfile.ZipFile(tmp_path / "images.zip") as archive:
        assert archive.namelist() == ["0/a.png", "1/c.png", "dataset.json"]
    assert "0/b" not in again


def test_images_are_not_synced_one_by_one(store, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: pytest.fail("synced"))  # noqa: ARG005
    store.write("1/d", PIXELS[3])
    assert "1/d" in store


def test_compression_changes_the_size_but_no_pixel(tmp_path):
    image = torch.arange(64).repeat(3, 64, 1).to(torch.uint8)
    sizes = []
    for level in (0, 1, 9):
        store = ImageStore(tmp_path, SETTINGS, level)
        store.begin()
        store.write(f"{level}", image)
        sizes.append(store.path(f"{level}").stat().st_size)
        assert torch.equal(next(iter(store.images([f"{level}"], (64, 64)).batches(1)))[0], image)
    assert sizes[0] > sizes[1] > sizes[2]


@contextmanager
def full_disk(room):
    """Limit the size of files to `room` bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


def test_a_full_disk_is_reported_and_leaves_no_incomplete_file(tmp_path):
    store = ImageStore(tmp_path, {})
    store.begin()
    with full_disk(1000), pytest.raises(UserError, match=r"a\.png cannot be written: File too large"):
        store.write("a", torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8))
    assert not list(store.folder.iterdir())
    assert "a" not in store


def test_a_disk_too_full_for_the_zip_keeps_the_images(store, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    with full_disk(300), pytest.raises(UserError, match=r"^output=.*images\.zip cannot be written: File too large$"):
        store.pack()
    assert sorted(tmp_path.rglob("*")) == before
    assert torch.equal(torch.cat(batches(store, NAMES[:3], 3)), PIXELS[:3])


def test_the_zip_is_synced_before_images_are_deleted(store, monkeypatch):
    synced = []

    def fsync(handle):
        assert len(list(store.folder.rglob("*.png"))) == 3
        synced.append(Path(f"/proc/self/fd/{handle}").readlink())

    monkeypatch.setattr(os, "fsync", fsync)
    store.pack()
    assert [synced[0].suffix, synced[1]] == [".tmp", store.archive.parent]
