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
from relay_diffusion.data.convert import Classes, ConvertOptions, Fit, convert, fit_problem, fitted, usable_images
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.decode import UnusableImageError, box_average, decode
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError

NAMES = ["cat/b.png", "cat/sub/a.png", "dog/c.png"]


def options(source: Path, destination: Path, resolution: object = 8, **others: object) -> ConvertOptions:
    return ConvertOptions(str(source), str(destination), resolution, **others)  # type: ignore[arg-type]


def members(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def converted(tmp_path: Path, image: Image.Image, resolution: int, fit: Fit = Fit.crop) -> np.ndarray:
    source = write_zip(tmp_path / "in.zip", {"a.png": encoded(image)})
    convert(options(source, tmp_path / "out.zip", resolution, fit=fit, classes=Classes.none))
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


def striped(height: int, width: int) -> Image.Image:
    """Left half red, right half blue."""
    image = Image.new("RGB", (width, height), (200, 0, 0))
    image.paste((0, 0, 200), (width // 2, 0, width, height))
    return image


@pytest.mark.parametrize("fit", list(Fit))
@pytest.mark.parametrize("size", [(8, 8), (8, 16), (16, 8), (9, 11)])
@pytest.mark.parametrize("stored", [(8, 8), (24, 24), (16, 40), (41, 17), (33, 48)])
def test_every_fit_gives_the_size_or_a_reason(stored: tuple[int, int], size: tuple[int, int], fit: Fit) -> None:
    problem = fit_problem(stored, size, fit)
    if problem is None:
        assert fitted(striped(*stored), size, fit, "a.png").size == size[::-1]
    else:
        with pytest.raises(UnusableImageError, match=rf"^a\.png is {stored[1]}x{stored[0]}, ") as caught:
            fitted(striped(*stored), size, fit, "a.png")
        assert caught.value.reason == problem
        if fit is not Fit.none:
            assert fitted(striped(*stored), size, fit, "a.png", upscale=True).size == size[::-1]
    assert usable_images({stored: 3}, size, fit) == 3 * (problem is None)


def test_fits_differ_in_what_they_show_of_a_wide_image() -> None:
    image, green = striped(16, 48), (0, 200, 0)
    shown = {fit: np.asarray(fitted(image, (8, 8), fit, "a.png", background=green)) for fit in list(Fit)[:3]}
    red, blue = [200, 0, 0], [0, 0, 200]
    np.testing.assert_array_equal(shown[Fit.crop][0], [red] * 4 + [blue] * 4)  # the middle 16 of 48 columns
    expected = np.asarray(image.resize((8, 8), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(shown[Fit.stretch], expected)
    assert [row[0].tolist() for row in shown[Fit.pad]] == [list(green)] * 2 + [red] * 3 + [list(green)] * 3
    inner = np.asarray(image.resize((8, 3), Image.Resampling.LANCZOS))
    np.testing.assert_array_equal(shown[Fit.pad][2:5], inner)


def test_padding_averages_blocks_for_an_integer_factor() -> None:
    wide = Image.fromarray(np.concatenate([pixels(0, 16), pixels(1, 16)], axis=1))
    padded = np.asarray(fitted(wide, (16, 16), Fit.pad, "a.png"))
    np.testing.assert_array_equal(padded[4:12], np.asarray(box_average(wide, 2)))
    assert (padded[:4] == 255).all()
    assert (padded[12:] == 255).all()


def test_the_background_is_behind_transparent_pixels_and_in_margins(tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    source = write_zip(tmp_path / "in.zip", {"a.png": encoded(image)})
    how = {"fit": Fit.pad, "classes": Classes.none, "background": "#0a141e"}
    convert(options(source, tmp_path / "out.zip", **how))
    written = np.asarray(Image.open(io.BytesIO(members(tmp_path / "out.zip")["a.png"])))
    assert (written == [10, 20, 30]).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("resolution", ["[8,16]", [8, 16]])
def test_rectangles_of_any_channels(tmp_path: Path, channels: int, mode: str, resolution: object) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 48, 4)).astype(np.uint8))
    source = write_zip(tmp_path / "in.zip", {"a.png": encoded(image)})
    result = convert(options(source, tmp_path / "out.zip", resolution, channels=channels, classes=Classes.none))
    assert result.images == 1
    written = Image.open(io.BytesIO(members(tmp_path / "out.zip")["a.png"]))
    assert (written.mode, written.size) == (mode, (16, 8))
    converted_first = decode(encoded(image), "a.png", channels=channels).image
    assert written.tobytes() == box_average(converted_first.crop((8, 0, 40, 16)), 2).tobytes()


def test_margins_are_transparent_with_an_alpha_channel(tmp_path: Path) -> None:
    source = write_zip(tmp_path / "in.zip", {"a.png": encoded(Image.new("RGB", (32, 16), "red"))})
    convert(options(source, tmp_path / "out.zip", 16, channels=4, fit=Fit.pad, classes=Classes.none))
    written = np.asarray(Image.open(io.BytesIO(members(tmp_path / "out.zip")["a.png"])))
    assert (written[4:12] == [255, 0, 0, 255]).all()
    assert (written[[0, 1, 2, 3, 12, 13, 14, 15]] == [255, 255, 255, 0]).all()


def test_upscale_enlarges_all_but_tiny_images(tmp_path: Path) -> None:
    files = {"a.png": encoded(pixels(0, 8)), "b.png": encoded(pixels(1, 32)), "c.png": encoded(pixels(2, 7))}
    source = write_zip(tmp_path / "in.zip", files)
    how = {"upscale": True, "classes": Classes.none}
    with pytest.raises(UserError, match=r"'c\.png' in .* is 7x7, smaller than 8 pixels; skip_bad=true"):
        convert(options(source, tmp_path / "out.zip", 16, **how))
    result = convert(options(source, tmp_path / "out.zip", 16, skip_bad=True, **how))
    assert (result.images, result.enlarged) == (2, 1)
    enlarged = np.asarray(Image.open(io.BytesIO(members(tmp_path / "out.zip")["a.png"])))
    expected = Image.fromarray(pixels(0, 8)).resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(enlarged, np.asarray(expected))


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


def test_fit_none_refuses_what_is_not_square(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is 12x8, not square; use fit=crop, pad or stretch"):
        converted(tmp_path, Image.new("RGB", (12, 8)), 8, Fit.none)


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
        (options(source, tmp_path / "out.zip", 0), "^resolution=0: must lie between 8 and 16,384"),
        (options(source, tmp_path / "out.zip", 7), "^resolution=7: must lie between 8 and 16,384"),
        (
            options(source, tmp_path / "out.zip", "[8]"),
            r"^resolution=\[8\]: must be a whole number, or \[height, width\]",
        ),
        (
            options(source, tmp_path / "out.zip", "big"),
            r"^resolution=big: must be a whole number, or \[height, width\]",
        ),
        (options(source, tmp_path / "out.zip", channels=2), r"^channels=2: must be 1 \(grayscale\), 3"),
        (options(source, tmp_path / "out.zip", background="blurple"), "^background=blurple: use a color name"),
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
        (["source=a", "destination=b.zip", "fit=left"], "fit=left: use one of crop, pad, stretch, none"),
        (["source=a", "destination=b.zip", "exif=no"], "exif=no: use apply or ignore"),
        (["source=a", "destination=b.zip", "channels=RGB"], "channels=RGB: must be a whole number"),
        (["source=a", "destination=b.zip", "class_level=a"], "class_level=a: must be a whole number"),
        (["source=a", "destination=b.zip", "skip_bad=maybe"], "skip_bad=maybe: use true or false"),
    ],
)
def test_argument_mistakes_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_arguments(ConvertOptions, arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_arguments_become_typed_options() -> None:
    parsed = parse_arguments(
        ConvertOptions, ["source=2024_01", "destination=a=b.zip", "resolution=64", "fit=none", "skip_bad=true"]
    )
    assert parsed == ConvertOptions("2024_01", "a=b.zip", "64", Fit.none, Classes.folders, True)


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
    assert done.stderr.startswith("left out: 1 of 4 images\n")


def test_images_left_out_are_summarized(tmp_path: Path) -> None:
    """One line for each reason, not for each image."""
    frames = [Image.new("RGB", (16, 16), (value, 0, 0)) for value in (200, 100)]
    files = {f"small/{number}.png": encoded(striped(12, 20)) for number in range(7)}
    files |= {f"large/{number}.png": encoded(striped(70, 40)) for number in range(3)}
    files["large/moving.png"] = encoded(frames[0], save_all=True, append_images=frames[1:])
    files["large/cut.png"] = encoded(striped(70, 40))[:-20]
    source = write_folder(tmp_path / "images", files)
    done = run(f"source={source}", f"destination={tmp_path / 'out.zip'}", "resolution=40", "skip_bad=true")
    assert done.returncode == 0
    assert done.stderr.splitlines() == [
        "left out: 9 of 12 images",
        "  7 smaller than resolution=40; upscale=true enlarges such images (small/0.png, small/1.png, small/2.png, "
        "small/3.png, small/4.png, ...)",
        "  1 damaged (large/cut.png)",
        "  1 animated (large/moving.png)",
        "warning: large is the only class; use classes=none, or class_level=N",
    ]
    assert "images that each resolution keeps without enlarging: 32: 3, 40: 3\n" in done.stdout
    done = run(f"source={source}", f"destination={tmp_path / 'pad.zip'}", "resolution=16", "skip_bad=true", "fit=pad")
    assert "images that each resolution keeps without enlarging: 16: 10, 32: 3, 64: 3\n" in done.stdout


def test_files_of_other_types_are_reported(tmp_path: Path) -> None:
    others = dict.fromkeys(["cat/x.BMP", "dog/y.tiff", "dog/sub/z.gif", "w.gif"], b"?")
    hidden = dict.fromkeys(["cat/._b.bmp", ".DS_Store", "dog/Thumbs.db", ".git/x.bmp"], b"?")
    for source in (
        write_folder(tmp_path / "folder", pngs(NAMES) | others | hidden),
        write_zip(tmp_path / "in.zip", pngs(NAMES) | others | hidden),
    ):
        done = run(f"source={source}", f"destination={source}-out.zip", "resolution=8")
        names = "cat/x.BMP, dog/sub/z.gif, dog/y.tiff, w.gif"
        assert (done.returncode, done.stderr) == (0, f"ignored: 4 files of other types (.bmp, .gif, .tiff): {names}\n")
    labels = {"labels": [[name, 0] for name in NAMES]}
    clean = write_zip(tmp_path / "clean.zip", pngs(NAMES) | hidden, labels)
    assert convert(options(clean, tmp_path / "out.zip", classes=Classes.keep)).ignored == []
    odd = dict.fromkeys([*(f"a.{number}" for number in range(10)), "README"], b"")
    many = write_zip(tmp_path / "many.zip", pngs(NAMES) | odd)
    reported = run(f"source={many}", f"destination={tmp_path / 'many-out.zip'}", "resolution=8").stderr
    assert reported.startswith("ignored: 11 files of other types (.0, ")
    assert reported.endswith(", ...): README, a.0, a.1, a.2, a.3, ...\n")


def test_tools_start_without_torch() -> None:
    code = (
        "import sys, relay_diffusion.cli.convert_images; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
