"""data=huggingface: splits, columns, labels, captions, and errors."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from formats_on_disk import table, write_parquet
from hub_server import FakeHub, Repository, running_hub
from pictures_on_disk import pngs
from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.huggingface import HuggingFaceFormat
from relay_diffusion.errors import UserError

datasets = pytest.importorskip("datasets")

IMAGES = list(pngs([f"{number}.png" for number in range(6)]).values())


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def opened(path: Path | str, subset: str = "", **columns: Any) -> ImageDataset:
    return ImageDataset(path, 8, subset, format=HuggingFaceFormat(**columns))


def refused(path: Path | str, message: str, **columns: Any) -> None:
    with pytest.raises(UserError, match=message) as caught:
        opened(path, **columns)
    assert "\n" not in str(caught.value)


def test_class_names_come_from_the_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES, [1, 0, 1, 2, 0, 1], classes=["cat", "dog", "owl"])
    dataset = opened(path, label_column="label")
    assert (dataset.class_names, dataset.labels) == (["cat", "dog", "owl"], [1, 0, 1, 2, 0, 1])
    assert dataset.names[:2] == ["train[0]", "train[1]"]


def test_whole_numbers_are_classes(tmp_path: Path) -> None:
    dataset = opened(write_parquet(tmp_path / "a.parquet", IMAGES, [1, 0, 1, 2, 0, 1]), label_column="label")
    assert (dataset.class_names, dataset.labels[3]) == (["0", "1", "2"], 2)


def test_columns_are_read_only_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES, [0] * 6, ["x"] * 6)
    dataset = opened(path)
    assert (dataset.num_classes, dataset.labels, dataset.captions) == (0, [-1] * 6, [[]] * 6)
    assert f"note: data.dataset.path={path}: ignored columns label, text" in capsys.readouterr().out


def test_a_row_has_any_number_of_captions(tmp_path: Path) -> None:
    captions = [["a cat", " two cats "], None, [], [""], ["b"], ["c"]]
    dataset = opened(write_parquet(tmp_path / "a.parquet", IMAGES, None, captions), caption_column="text")
    assert dataset.captions == [["a cat", "two cats"], [], [], [], ["b"], ["c"]]


def test_a_missing_label_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES, [0, 1, None, 0, 1, 0])
    refused(path, r"^data\.dataset\.path=.*: column 'label': .* no entry for 'train\[2\]'", label_column="label")
    assert opened(write_parquet(tmp_path / "b.parquet", IMAGES, [None] * 6, ["x"] * 6)).num_classes == 0


def test_a_label_without_a_class_is_named(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES, [0, 1, 0, -1, 1, 0], classes=["a", "b"])
    refused(path, r"column 'label': labels\[3\], 'train\[3\]': class -1 must be 0\.\.1", label_column="label")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_column": "picture"}, "data.dataset.path=.* has no such column; its columns: image, label, text"),
        ({"label_column": "class"}, ".*its columns: image, label, text"),
        ({"caption_column": "caption"}, ".*its columns: image, label, text"),
        ({"image_column": "text"}, "the column holds string, not encoded images"),
        ({"label_column": "text"}, "the column holds string, not class indices"),
        ({"caption_column": "label"}, "the column holds int64, not texts"),
        ({"split": "test"}, "data.dataset.path=.* has no such split; available: train"),
        ({"config": "large"}, ".* is a file, which has no configurations"),
    ],
)
def test_missing_and_unsuitable_columns(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES, [0] * 6, ["x"] * 6)
    ((option, value),) = columns.items()
    refused(path, rf"^data\.dataset\.format\.{option}={value}: {message}", **columns)


def test_text_needs_a_caption_column(tmp_path: Path) -> None:
    dataset = opened(write_parquet(tmp_path / "a.parquet", IMAGES, None, ["x"] * 6))
    with pytest.raises(
        UserError, match=r"^text: .* has no captions; use text=none, or data\.dataset\.format\.caption_column=text$"
    ):
        ImageDataModule(dataset, 2, captions=True)


def test_plain_bytes_are_images_too(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"png": IMAGES}), tmp_path / "a.parquet")
    assert len(opened(tmp_path / "a.parquet", image_column="png")) == 6


def test_splits_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write_parquet(folder / "train-00000-of-00002.parquet", IMAGES[:2], [0, 0], ["x"] * 2)
    write_parquet(folder / "train-00001-of-00002.parquet", IMAGES[2:4], [1, 1], ["x"] * 2)
    write_parquet(folder / "validation-00000-of-00001.parquet", IMAGES[4:], [0, 1], ["x"] * 2)
    assert opened(folder, label_column="label").labels == [0, 0, 1, 1]
    for heldout in (opened(folder, split="validation"), opened(folder, subset="validation")):
        assert heldout.names == ["validation[0]", "validation[1]"]
        assert heldout._set._source.read("validation[1]") == IMAGES[5]
    (tmp_path / "link").symlink_to(folder)
    assert len(opened(tmp_path / "link")) == 4
    refused(folder, r"split=test: .*available: train, validation", split="test")


def test_splits_of_a_saved_set(tmp_path: Path) -> None:
    saved = {"train": datasets.Dataset(table(IMAGES[:4])), "test": datasets.Dataset(table(IMAGES[4:]))}
    datasets.DatasetDict(saved).save_to_disk(str(tmp_path / "set"))
    assert opened(tmp_path / "set", split="test").names == ["test[0]", "test[1]"]
    refused(tmp_path / "set", r"split=valid: .*available: train, test", split="valid")


def test_arrow_files(tmp_path: Path) -> None:
    import pyarrow

    made = table(IMAGES, [0] * 6, ["x"] * 6)
    for name, writer in (("stream", pyarrow.ipc.new_stream), ("file", pyarrow.ipc.new_file)):
        with writer(str(tmp_path / f"{name}.arrow"), made.schema) as file:
            file.write_table(made)
        assert opened(tmp_path / f"{name}.arrow")._set._source.read("train[5]") == IMAGES[5]


def test_a_changed_file_is_converted_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES)
    assert len(opened(path)) == len(opened(path)) == 6
    assert capsys.readouterr().out.count("copied once to") == 1
    write_parquet(path, IMAGES[:4])
    os.utime(path, (1, 1))
    assert len(opened(path)) == 4


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Hub with the repository user/set: six rows, and a script."""
    with running_hub() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        path = write_parquet(tmp_path / "a.parquet", IMAGES, [0, 1] * 3)
        repository = server.repositories["user/set"] = Repository()
        repository.commit({"data/train-0.parquet": path.read_bytes(), "set.py": b"raise SystemExit", "b.bin": b""})
        repository.refs["v1"] = repository.refs["main"]
        repository.commit({"data/train-0.parquet": write_parquet(path, IMAGES[:2], [0, 1]).read_bytes()})
        yield server


def test_a_dataset_on_the_hub(hub: FakeHub) -> None:
    assert len(opened("hf://user/set")) == 2
    for address in ("hf://user/set@v1", "hf://user/set@v1/data"):
        dataset = opened(address, label_column="label")
        assert (dataset.labels, str(dataset.path)) == ([0, 1] * 3, address)
    assert {*hub.downloaded()} <= {"data/train-0.parquet", "README.md"}


def test_a_dataset_in_the_cache_needs_no_network(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    opened("hf://user/set")
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert len(opened("hf://user/set")) == 2
    assert hub.requests == []


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://user/other", "cannot be read"),
        ("hf://user/set@v2", "cannot be read"),
        ("hf://user/set/nothing", r"holds no parquet file; .*hf://user/set@refs%2Fconvert%2Fparquet"),
        ("hf://set", r"is not an address on the Hub; write hf://USER/NAME\[@REVISION\]\[/FOLDER\]"),
        ("hf://user/set/../x", "is not an address on the Hub"),
    ],
)
def test_addresses_that_do_not_exist(address: str, message: str) -> None:
    refused(address, rf"^data\.dataset\.path={address}: {message}")


def test_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", IMAGES)
    monkeypatch.setattr("relay_diffusion.utils.installed.find_spec", lambda _: None)
    refused(path, r"^data\.dataset\.path=.*: needs the library datasets: pip install -e '\.\[datasets\]'$")
    assert importlib.util.find_spec("datasets") is not None
