"""Files that are ignored because of their type are reported, wherever images are read."""

from __future__ import annotations

from pathlib import Path

import pytest

from pictures_on_disk import pngs, write_folder, write_zip
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.sources import describe_files, open_source
from relay_diffusion.data.start_images import StartImages
from relay_diffusion.errors import UserError

FILES = pngs(["a/0.png", "b/1.png"]) | dict.fromkeys(
    ["a/x.gif", "b/y.BMP", "notes.txt", ".hidden", "dataset.json"], b"{}"
)
READERS = {
    "relay.start": lambda path, subset: StartImages(path, subset),
    "data.dataset.path": lambda path, subset: ImageDataset(path, 8, subset, labels=False),
    "images": lambda path, subset: open_image_set(path, "images", subset=subset),
}


@pytest.mark.parametrize("write", [write_folder, write_zip])
@pytest.mark.parametrize("option", READERS)
def test_they_are_reported_once(tmp_path: Path, option: str, write, capsys: pytest.CaptureFixture[str]) -> None:
    path, read = write(tmp_path / "images.zip", FILES), READERS[option]
    read(path, "")
    names = "a/x.gif, b/y.BMP, notes.txt"
    assert capsys.readouterr().out == (
        f"note: {option}={path}: ignored 3 files of other types (.bmp, .gif, .txt): {names}\n"
    )
    read(path, "a")
    assert capsys.readouterr().out == f"note: {option}={path}: ignored 1 file of another type (.gif): a/x.gif\n"


def test_only_the_first_names_of_many_are_listed() -> None:
    assert describe_files([f"{number}.gif" for number in range(1200)]) == (
        "1,200 files of other types (.gif): 0.gif, 1.gif, 2.gif, 3.gif, 4.gif, ..."
    )


def test_a_folder_without_images_names_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"but 1 file of another type \(\.gif\): a\.gif; save images as PNG$"):
        StartImages(write_folder(tmp_path / "gifs", {"a.gif": b"GIF89a"}))
    with pytest.raises(UserError, match=r"holds no image \(\.png, \.webp, \.jpg, \.jpeg\)$"):
        StartImages(write_folder(tmp_path / "nothing", {".hidden": b""}))


def test_a_single_file_of_another_type_has_a_remedy(tmp_path: Path) -> None:
    write_folder(tmp_path, {"a.gif": b"GIF89a"})
    with pytest.raises(UserError, match=r"^relay\.start=.*a\.gif: is neither an image .*; save an image as PNG, or"):
        StartImages(tmp_path / "a.gif")
    with pytest.raises(UserError, match=r"^source=.*a\.gif: not a folder, zip or tar, .*; save an image as PNG"):
        open_source(tmp_path / "a.gif", "source", tar=True)
