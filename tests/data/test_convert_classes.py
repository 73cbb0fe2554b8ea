"""Class, split and wrapping folders in the converter and its report."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pictures_on_disk import encoded, pixels, pngs, write_folder, write_tar, write_zip
from relay_diffusion.cli.arguments import parse_arguments
from relay_diffusion.cli.convert_images import report_conversion
from relay_diffusion.config import compose
from relay_diffusion.data.class_choice import labels_like_reference
from relay_diffusion.data.convert import Classes, ConvertOptions, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.errors import UserError

SPLIT_SET = ["train/cat/a.png", "train/dog/b.png", "train/dog/c.png", "val/cat/d.png", "val/dog/e.png"]


def converted(tmp_path: Path, names: list[str], **others: object) -> ImageDataset:
    source = write_zip(tmp_path / "in.zip", pngs(names))
    convert(ConvertOptions(str(source), str(tmp_path / "out.zip"), 8, **others))  # type: ignore[arg-type]
    return ImageDataset(tmp_path / "out.zip", 8)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "relay_diffusion.cli.convert_images", *arguments, "resolution=8"]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_zip_with_one_folder_around_everything_has_its_classes(tmp_path: Path) -> None:
    junk = {"__MACOSX/photos/cat/._a.png": b"", ".DS_Store": b"", "README.txt": b"", "photos/.hidden/x.png": b""}
    files = pngs(["photos/cat/a.png", "photos/dog/b.png"])
    sources = [
        write_zip(tmp_path / "in.zip", files | junk),
        write_tar(tmp_path / "in.tar", files | junk),
        write_folder(tmp_path / "in", files | junk),
    ]
    for source in sources:
        destination = tmp_path / f"{source.name}-out.zip"
        assert convert(ConvertOptions(str(source), str(destination), 8)).class_names == ["cat", "dog"]
        dataset = ImageDataset(destination, 8)
        assert (dataset.names, dataset.labels) == (["cat/a.png", "dog/b.png"], [0, 1])


@pytest.mark.parametrize("wrapper", ["", "download/v2/"])
def test_splits_share_the_classes_and_a_subset_keeps_their_indices(tmp_path: Path, wrapper: str) -> None:
    names = ["train/ant/x.png", *SPLIT_SET]  # val has no ant
    whole = converted(tmp_path, [wrapper + name for name in names])
    assert whole.class_names == ["ant", "cat", "dog"]
    train, val = (ImageDataset(whole.path, 8, subset=subset) for subset in ("train", "val"))
    assert (train.num_classes, train.labels) == (3, [0, 1, 2, 2])
    assert (val.num_classes, val.labels) == (3, [1, 2])
    assert sorted(labels_like_reference(whole.path, "val", 3, ["ant", "cat", "dog"], "reference")) == [1, 2]


def test_class_level_chooses_the_folder(tmp_path: Path) -> None:
    dataset = converted(tmp_path, ["x/usa/cat/a.png", "x/usa/dog/b.png", "x/peru/cat/c.png"], class_level=2)
    assert dataset.class_names == ["peru", "usa"]
    assert dataset.names == ["peru/cat/c.png", "usa/cat/a.png", "usa/dog/b.png"]
    for others, message in [
        ({"class_level": 0}, "class_level=0: must be at least 1"),
        ({"class_level": 1, "classes": Classes.none}, "class_level=1: is for classes=folders, not classes=none"),
        ({"class_level": 9}, "classes=folders: .* is in 3 folders, but class_level=9"),
    ]:
        with pytest.raises(UserError, match=message):
            converted(tmp_path, ["x/usa/cat/a.png"], **others, overwrite=True)


def test_names_stay_without_classes(tmp_path: Path) -> None:
    assert converted(tmp_path, ["photos/cat/a.png"], classes=Classes.none).names == ["photos/cat/a.png"]


def test_classes_splits_and_wrappers_are_printed(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "in.zip", pngs([f"w/{name}" for name in ["train/ant/x.png", *SPLIT_SET]]))
    done = run(f"source={source}", f"destination={tmp_path / 'out.zip'}")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-7:] == [
        "classes: the folders of level 3 (class_level)",
        "left out of the names: w/",
        "splits (data.dataset.subset): train (4 images), val (2 images)",
        "  ant        1",
        "  cat        2",
        "  dog        3",
        f"{tmp_path / 'out.zip'}: 6 images of 8x8, 3 classes, 0 left out",
    ]
    assert done.stderr == "warning: val has no image of 1 of 3 classes: ant\n"


@pytest.mark.parametrize(
    ("splits", "words", "expected"),
    [
        (("", ""), [], {}),
        (("Train/", "val/"), ["channels=4"], {"data.dataset.subset": "Train", "data.dataset.channels": "4"}),
        (("", ""), ["captions=txt"], {"text": "minilm"}),
        (("", ""), ["resolution=96"], None),  # no multiple of 64
        (("", ""), ["resolution=[64,128]"], None),  # own_64 reads squares
    ],
)
def test_the_report_ends_with_the_command_that_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], splits: tuple[str, str], words: list[str], expected: dict | None
) -> None:
    """Also for a destination whose name needs quotes."""
    images = {
        f"{split}{kind}/{number}.png": encoded(pixels(0, 128)) for kind in "ab" for number, split in enumerate(splits)
    }
    source, destination = (
        write_folder(tmp_path / "in", images | {f"{splits[0]}a/0.txt": b"red"}),
        tmp_path / "it's, mine.zip",
    )
    options = [f"source={source}", f"destination={destination}", "resolution=64", *words]
    report_conversion(parse_arguments(ConvertOptions, options))
    line = capsys.readouterr().out.splitlines()[-1]
    if expected is None:
        assert line.startswith(f"{destination}: 4 images of ")
        return
    command = shlex.split(line)
    assert command[:4] == ["train:", "python", "train.py", "experiment=own_64"]
    given = dict(word.split("=", 1) for word in command[4:])
    assert {key: given[key] for key in given.keys() - {"data.dataset.path", "run_dir"}} == expected
    dataset = compose("train", command[3:]).data.dataset
    assert dataset.path == str(destination)
    opened = ImageDataset(dataset.path, dataset.resolution, subset=dataset.subset, channels=dataset.channels)
    assert (opened.num_classes, len(opened.names)) == (2, 2 if dataset.subset else 4)


def test_a_thousand_classes_are_printed_in_a_few_short_lines(tmp_path: Path) -> None:
    names = [f"c{number:04d}/a.png" for number in range(1000)] + ["\x1b[2J/a.png", "x" * 200 + "/a.png", "x/b/c.png"]
    source = write_zip(tmp_path / "in.zip", dict.fromkeys([*names, "x/b/d.png"], encoded(pixels(0))))
    done = run(f"source={source}", f"destination={tmp_path / 'out.zip'}")
    lines = done.stdout.splitlines()
    assert lines[-2] == "  ... and 983 more, 1 to 2 images each"
    assert r"\x1b[2J" in done.stdout
    assert "\x1b" not in done.stdout
    assert len(lines) < 50
    assert max(map(len, lines[-22:-1])) < 120  # the last names the destination


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (
            ["usa/cat/a.png", "peru/dog/b.png"],
            "warning: 2 of 2 class folders hold folders, but no image (peru, usa): class_level=2 takes the folders",
        ),
        (["extra/dog/a.png", "cat/b.png"], "warning: 1 of 2 class folders hold folders, but no image (extra)"),
        (["w/photos/a.png"], "warning: photos is the only class; use classes=none"),
    ],
)
def test_what_looks_like_the_wrong_folders_is_warned_about(tmp_path: Path, names: list[str], warning: str) -> None:
    done = run(f"source={write_zip(tmp_path / 'in.zip', pngs(names))}", f"destination={tmp_path / 'out.zip'}")
    assert done.returncode == 0
    assert done.stderr.startswith(warning)
    assert done.stderr.count("\n") == 1


def test_an_existing_destination_is_kept_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    source, destination = write_zip(tmp_path / "in.zip", pngs(["cat/a.png"])), tmp_path / "out.zip"
    destination.write_bytes(b"precious")
    done = run(f"source={source}", f"destination={destination}")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"error: destination={destination}: exists already; choose another name, or overwrite=true to replace it\n"
    )
    assert destination.read_bytes() == b"precious"
    assert run(f"source={source}", f"destination={destination}", "overwrite=true").returncode == 0
    assert ImageDataset(destination, 8).names == ["cat/a.png"]
