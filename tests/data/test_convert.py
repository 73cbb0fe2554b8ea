from __future__ import annotations

import io
import json
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures_on_disk import encoded, pixels, pngs, write_folder, write_tar, write_zip
from relay_diffusion.cli.arguments import parse_arguments
from relay_diffusion.data.convert import Classes, ConvertOptions, Crop, convert
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError

NAMES = ["cat/b.png", "cat/sub/a.png", "dog/c.png"]


def options(source: Path, destination: Path, resolution: int = 8, **others: object) -> ConvertOptions:
    return ConvertOptions(str(source), str(destination), resolution, **others)  # type: ignore[arg-type]


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def converted(tmp_path: Path, image: Image.Image, resolution: int, crop: Crop = Crop.center) -> np.ndarray:
    source = write_zip(tmp_path / "in.zip", {"a.png": encoded(image)})
    convert(options(source, tmp_path / "out.zip", resolution, crop=crop, classes=Classes.none))
    return np.asarray(Image.open(io.BytesIO(members(tmp_path / "out.zip")["a.png"])))


# --- what is written


def test_folder_zip_and_tars_give_the_same_data_set(tmp_path: Path) -> None:
    files = pngs(NAMES)
    dotted = {f"./{name}": data for name, data in files.items()}  # as `tar -C folder .` names them
    sources = [
        write_folder(tmp_path / "folder", files | {".cat/hidden.png": b"", "cat/notes.txt": b""}),
        write_zip(tmp_path / "in.zip", files),
        write_tar(tmp_path / "in.tar", dotted),
        write_tar(tmp_path / "in.tgz", dotted, "w:gz"),
    ]
    outputs = []
    for index, source in enumerate(sources):
        destination = tmp_path / f"made/{index}.zip"  # its folder is made too
        result = convert(options(source, destination))
        assert (result.images, result.class_names, result.left_out) == (3, ["cat", "dog"], [])
        outputs.append(destination.read_bytes())
    assert len(set(outputs)) == 1
    dataset = ImageDataset(destination, 8)
    assert dataset.names == NAMES
    assert [label for _, label in dataset] == [0, 0, 1]
    for index, (image, _) in enumerate(dataset):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels(index))


def test_zip_is_stored_with_fixed_times(tmp_path: Path) -> None:
    convert(options(write_zip(tmp_path / "in.zip", pngs(NAMES)), tmp_path / "out.zip"))
    with zipfile.ZipFile(tmp_path / "out.zip") as archive:
        assert {info.compress_type for info in archive.infolist()} == {zipfile.ZIP_STORED}
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["in.zip", "out.zip"]


def test_integer_factor_is_the_box_average_of_the_middle(tmp_path: Path) -> None:
    wide = np.concatenate([pixels(0, 16), pixels(1, 16)], axis=1)
    middle = wide[:, 8:24].reshape(8, 2, 8, 2, 3).astype(float).mean((1, 3))
    np.testing.assert_array_equal(converted(tmp_path, Image.fromarray(wide), 8), np.floor(middle + 0.5))


def test_other_factors_use_lanczos(tmp_path: Path) -> None:
    image = Image.fromarray(pixels(0, 12))
    expected = np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(converted(tmp_path, image, 8), expected)


def test_same_stem_with_two_endings(tmp_path: Path) -> None:
    files = {"a.png": encoded(pixels(0)), "a.jpg": encoded(pixels(1), "JPEG"), "b.webp": encoded(pixels(2), "WEBP")}
    convert(options(write_zip(tmp_path / "in.zip", files), tmp_path / "out.zip", classes=Classes.none))
    assert set(members(tmp_path / "out.zip")) == {"a.png.png", "a.jpg.png", "b.png", "dataset.json"}


def test_classes_none_and_keep(tmp_path: Path) -> None:
    labels = {"labels": [[name, index] for index, name in enumerate(NAMES)], "classes": ["x", "y", "z"]}
    source = write_zip(tmp_path / "in.zip", pngs(NAMES), labels)
    convert(options(source, tmp_path / "out.zip", classes=Classes.none))
    assert json.loads(members(tmp_path / "out.zip")["dataset.json"]) == {"labels": None}
    convert(options(source, tmp_path / "out.zip", classes=Classes.keep, overwrite=True))
    assert json.loads(members(tmp_path / "out.zip")["dataset.json"]) == labels
    with pytest.raises(UserError, match=r"classes=folders: .*has labels in dataset\.json.*classes=keep"):
        convert(options(source, tmp_path / "new.zip"))


# --- what is refused


@pytest.mark.parametrize("kind", ["zip", "tar"])
@pytest.mark.parametrize("name", ["/tmp/a.png", "../a.png", "cat/../../a.png"])
def test_hostile_archives(tmp_path: Path, kind: str, name: str) -> None:
    write = write_zip if kind == "zip" else write_tar
    source = write(tmp_path / "in.archive", {**pngs(NAMES), name: encoded(pixels(0))})
    with pytest.raises(UserError, match=r"source=.*absolute or leaves the archive"):
        convert(options(source, tmp_path / "out.zip"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.archive"]


def test_links_in_a_tar_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(encoded(pixels(9)))
    with tarfile.open(tmp_path / "in.tar", "w") as archive:
        for name, data in pngs(NAMES).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        archive.addfile(link)
    assert convert(options(tmp_path / "in.tar", tmp_path / "out.zip")).images == 3


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (b"no image", "is not a PNG"),
        (encoded(pixels(0, 64))[:500], "cannot be decoded"),
        (encoded(pixels(0, 4)), "is 4x4, smaller than resolution=8"),
    ],
)
def test_bad_images_stop_or_are_left_out(tmp_path: Path, broken: bytes, message: str) -> None:
    source = write_zip(tmp_path / "in.zip", {**pngs(NAMES), "cat/bad.png": broken})
    with pytest.raises(UserError, match=rf"'cat/bad\.png' in .*{message}.*skip_bad=true"):
        convert(options(source, tmp_path / "out.zip"))
    assert [path.name for path in tmp_path.iterdir()] == ["in.zip"]
    result = convert(options(source, tmp_path / "out.zip", skip_bad=True))
    assert result.images == len(ImageDataset(tmp_path / "out.zip", 8)) == 3
    assert len(result.left_out) == 1
    assert "cat/bad.png" in result.left_out[0]


def test_folders_of_which_nothing_is_left_are_no_classes(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "in.zip", {"bird/bad.png": b"no image", **pngs(NAMES)})
    assert convert(options(source, tmp_path / "out.zip", skip_bad=True)).class_names == ["cat", "dog"]
    written = ImageDataset(tmp_path / "out.zip", 8)
    assert (written.class_names, written.labels) == (["cat", "dog"], [0, 0, 1])


def test_failure_keeps_the_former_zip(tmp_path: Path) -> None:
    destination = write_zip(tmp_path / "out.zip", pngs(["old.png"]))
    before = destination.read_bytes()
    source = write_zip(tmp_path / "in.zip", {"cat/a.png": b"broken"})
    with pytest.raises(UserError, match="none of 1 images is usable"):
        convert(options(source, destination, skip_bad=True, overwrite=True))
    assert destination.read_bytes() == before


def test_crop_none_refuses_what_is_not_square(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is 12x8, not square; crop=center"):
        converted(tmp_path, Image.new("RGB", (12, 8)), 8, Crop.none)


def test_wrong_sources_and_destinations(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "in.zip", pngs(["a.png"]))
    (tmp_path / "text.txt").write_text("text")
    cut = tmp_path / "cut.tgz"
    cut.write_bytes(write_tar(tmp_path / "x.tgz", pngs(NAMES, side=64), "w:gz").read_bytes()[:-5000])
    for wrong, message in [
        (options(tmp_path / "gone", tmp_path / "out.zip"), "source=.*no such file"),
        (options(tmp_path / "text.txt", tmp_path / "out.zip"), "source=.*not a folder, zip or tar"),
        (options(cut, tmp_path / "out.zip"), "source=.*cut short"),
        (options(source, tmp_path / "out.tar", classes=Classes.none), r"destination=.*must end in \.zip"),
        (options(source, source, classes=Classes.none), "destination=.*is the source itself"),
        (options(source, tmp_path / "out.zip"), r"'a\.png' in .* is in no folder; use classes=none"),
        (options(source, tmp_path / "out.zip", classes=Classes.keep), "has no labels"),
        (options(source, tmp_path / "out.zip", 0), "resolution=0"),
        (options(source, Path("/proc/x.zip"), classes=Classes.none), "^destination=/proc/x.zip cannot be written: "),
        (options(source, tmp_path / "text.txt/x.zip", classes=Classes.none), "^destination=.* cannot be written: "),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            convert(wrong)
        assert "\n" not in str(caught.value)


def test_writer_refuses_a_name_twice_and_leaves_nothing(tmp_path: Path) -> None:
    def write() -> None:
        with image_zip(tmp_path / "out.zip") as writer:
            writer.add("a.png", Image.new("RGB", (4, 4)))
            writer.add("a.png", Image.new("RGB", (4, 4)))

    with pytest.raises(UserError, match=r"two images would be named 'a\.png'"):
        write()
    assert list(tmp_path.iterdir()) == []


# --- the command line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["source=a", "destination=b.zip", "resolutoin=64"], "unknown key 'resolutoin'; did you mean resolution?"),
        (["zzz=1"], "unknown key 'zzz'; available: source"),
        (["source"], "'source' is not of the form key=value"),
        (["resolution=64"], "missing: destination=..., source=..."),
        (["source=a", "destination=b.zip", "resolution=big"], "resolution=big: "),
        (["source=a", "destination=b.zip", "crop=left"], "crop=left: "),
    ],
)
def test_argument_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(ConvertOptions, arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_arguments_become_typed_options() -> None:
    parsed = parse_arguments(
        ConvertOptions, ["source=2024_01", "destination=a=b.zip", "resolution=64", "crop=none", "skip_bad=true"]
    )
    assert parsed == ConvertOptions("2024_01", "a=b.zip", 64, Crop.none, Classes.folders, True)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "relay_diffusion.cli.convert_images", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_command_line(tmp_path: Path) -> None:
    usage = run("--help")
    assert (usage.returncode, usage.stderr) == (0, "")
    assert "skip_bad" in usage.stdout
    wrong = run("source=x", "destinatoin=y.zip")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown key 'destinatoin'; did you mean destination?\n"
    source = write_zip(tmp_path / "in.zip", {**pngs(NAMES), "cat/bad.png": b""})
    done = run(f"source={source}", f"destination={tmp_path / 'out.zip'}", "resolution=8", "skip_bad=true")
    assert done.returncode == 0
    assert "converting: 4/4 images" in done.stdout
    assert "3 images of 8x8, 2 classes, 1 left out" in done.stdout
    assert done.stderr.startswith("left out: 'cat/bad.png' in ")


def test_files_of_other_types_are_reported(tmp_path: Path) -> None:
    others = dict.fromkeys(["cat/x.BMP", "dog/y.tiff", "dog/sub/z.gif", "w.gif"], b"?")
    hidden = dict.fromkeys(["cat/._b.bmp", ".DS_Store", "dog/Thumbs.db", ".git/x.bmp"], b"?")
    for source in (
        write_folder(tmp_path / "folder", pngs(NAMES) | others | hidden),
        write_zip(tmp_path / "in.zip", pngs(NAMES) | others | hidden),
    ):
        done = run(f"source={source}", f"destination={source}-out.zip", "resolution=8")
        assert (done.returncode, done.stderr) == (0, "ignored: 4 files of other types (.bmp, .gif, .tiff)\n")
    labels = {"labels": [[name, 0] for name in NAMES]}
    clean = write_zip(tmp_path / "clean.zip", pngs(NAMES) | hidden, labels)
    assert convert(options(clean, tmp_path / "out.zip", classes=Classes.keep)).ignored == []
    odd = dict.fromkeys([*(f"a.{number}" for number in range(10)), "README"], b"")
    many = write_zip(tmp_path / "many.zip", pngs(NAMES) | odd)
    reported = run(f"source={many}", f"destination={tmp_path / 'many-out.zip'}", "resolution=8").stderr
    assert reported.startswith("ignored: 11 files of other types (.0, ")
    assert reported.endswith(", ...)\n")


def test_tools_start_without_torch() -> None:
    code = (
        "import sys, relay_diffusion.cli.convert_images; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
