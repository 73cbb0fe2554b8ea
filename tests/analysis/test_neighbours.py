"""Command `neighbours`: copies, written files, picture, messages."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from torch import Tensor

from relay_diffusion.analysis import neighbours as analysis
from relay_diffusion.analysis.neighbours import compare, picture
from relay_diffusion.cli import neighbours as module
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.cli.neighbours import USAGE, NeighboursOptions, analyze
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.metrics import Inception
from relay_diffusion.metrics.neighbours import Neighbours
from relay_diffusion.training.loggers.wandb import WandbRun
from relay_diffusion.utils.run_lock import run_lock
from support import PROJECT
from support import run as run_command
from wandb_files import files_of, records, rows_of

COPY, MIRRORED = 5, 10  # of the reference


def run(*arguments: str) -> int:
    return run_tool(arguments, USAGE, NeighboursOptions, analyze)


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def save(folder: Path, images: Tensor) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:02d}.png")
    return folder


@pytest.fixture(autouse=True)
def inception(monkeypatch: pytest.MonkeyPatch) -> Inception:
    """Replace Inception features by pixels."""
    monkeypatch.syspath_prepend(str(PROJECT / "tests/metrics"))
    from fake_inception import PixelFeatures

    network = PixelFeatures()
    monkeypatch.setattr(module, "Inception", lambda weights, option: network)  # noqa: ARG005
    return network


@pytest.fixture(scope="module")
def reference(small_zip: Path) -> Tensor:
    """Read the images of small_zip [24,3,16,16]."""
    return torch.stack([image for image, _ in ImageDataset(small_zip, 16)])


@pytest.fixture
def images(reference: Tensor) -> Tensor:
    """Make a copy, a mirrored copy and noise."""
    noise = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8)
    return torch.stack([reference[COPY], reference[MIRRORED].flip(-1), noise])


def distances(
    images: Tensor, reference: Tensor, inception: Callable[[Tensor], Inception], mirrored: bool
) -> dict[str, Tensor]:
    """Compute distances [V,Q,N] by space to V views of the reference."""
    views = [reference, reference.flip(-1)] if mirrored else [reference]
    features = [inception(images).pool.double()[:, None] - inception(view).pool for view in views]
    pixels = [images.double().flatten(1)[:, None] - view.flatten(1) for view in views]
    return {
        "features": torch.stack([difference.norm(dim=2) for difference in features]),
        "pixels": torch.stack([difference.square().mean(2).sqrt() for difference in pixels]),
    }


@pytest.mark.parametrize("mirrored", [True, False])
def test_csv_holds_the_nearest(
    mirrored: bool, images: Tensor, reference: Tensor, small_zip: Path, tmp_path: Path, inception: Inception
) -> None:
    folder = save(tmp_path / "images", images)
    options = [f"mirrored={mirrored}", "nearest=4", f"destination={tmp_path}/new"]
    assert run(f"images={folder}", f"reference={small_zip}", *options) == 0
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["neighbours.csv", "neighbours.png"]
    rows = iter(read(tmp_path / "new" / "neighbours.csv"))
    expected = distances(images, reference, inception, mirrored)
    for index in range(3):
        for space in ("features", "pixels"):
            values, views = expected[space][:, index].min(0)
            for rank, position in enumerate(values.argsort()[:4].tolist(), 1):
                row = next(rows)
                assert float(row.pop("distance")) == pytest.approx(float(values[position]), rel=1e-7, abs=1e-4)
                assert row == {
                    "image": f"{index:02d}.png", "space": space, "rank": str(rank),
                    "neighbour": f"train/{position:03d}.png", "mirrored": str(bool(views[position])).lower(),
                }  # fmt: skip
    assert next(rows, None) is None


def test_copies_are_found_and_drawn(
    images: Tensor, small_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save(tmp_path / "images", images)
    assert run(f"images={folder}", f"reference={small_zip}", "nearest=2", f"destination={tmp_path}/new") == 0
    nearest = [row for row in read(tmp_path / "new" / "neighbours.csv") if row["rank"] == "1"]
    found = [(row["neighbour"], row["mirrored"], row["distance"]) for row in nearest if row["space"] == "pixels"]
    assert found[:2] == [("train/005.png", "false", "0"), ("train/010.png", "true", "0")]
    assert float(found[2][2]) > 50
    shown = np.array(Image.open(tmp_path / "new" / "neighbours.png"))
    # two pixels between images, twelve around a group
    assert shown.shape == (3 * 16 + 2 * 2, 16 + 12 + 34 + 12 + 34, 3)
    for row in range(2):
        here = slice(18 * row, 18 * row + 16)
        for left in (28, 74):  # the first of each group is the image itself, turned as the image is
            np.testing.assert_array_equal(shown[here, left : left + 16], shown[here, :16])
        assert (shown[here, 46:62] != shown[here, :16]).any()
    assert (shown[:, 16:28] == 255).all()
    printed = " ".join(capsys.readouterr().out.split())
    assert "images within the quantile 2 of 3 2 of 3" in printed


def test_mirrored_copies_are_ignored_with_mirrored_false(images: Tensor, small_zip: Path, tmp_path: Path) -> None:
    folder = save(tmp_path / "images", images)
    assert run(f"images={folder}", f"reference={small_zip}", "mirrored=false", f"destination={tmp_path}") == 0
    rows = read(tmp_path / "neighbours.csv")
    assert {row["mirrored"] for row in rows} == {"false"}
    assert [float(row["distance"]) == 0 for row in rows if row["space"] == "pixels"] == [True] + 8 * [False]


def test_a_set_is_its_own_nearest(small_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"images={small_zip}", f"reference={small_zip}", f"destination={tmp_path}") == 0
    first = [row for row in read(tmp_path / "neighbours.csv") if row["rank"] == "1"]
    assert len(first) == 2 * 24
    assert all(row["neighbour"] == row["image"] and row["mirrored"] == "false" for row in first)
    assert all(float(row["distance"]) < 1e-6 for row in first)
    printed = capsys.readouterr().out
    assert "24 of 24      24 of 24\n24 of 24 images, 24 reference images (24 for scale); " in printed


@pytest.mark.parametrize("most", [1000, 5])
@pytest.mark.parametrize("mirrored", [True, False])
def test_scale_is_the_reference_to_its_others(
    mirrored: bool,
    most: int,
    reference: Tensor,
    images: Tensor,
    small_zip: Path,
    inception: Inception,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(analysis, "MAX_SCALE", most)
    monkeypatch.setattr(analysis, "BATCH", 7)
    comparisons = compare(images, open_image_set(small_zip, "reference"), inception, 2, mirrored)
    chosen = list(range(24)) if most > 24 else [0, 4, 9, 14, 19]
    for space, expected in distances(reference, reference, inception, mirrored).items():
        nearest = expected.amin(0).fill_diagonal_(torch.inf).amin(1)  # neither itself nor its mirror image
        assert comparisons[space].found.distances.shape == (3, 2)
        torch.testing.assert_close(comparisons[space].scale, nearest[chosen], rtol=1e-9, atol=1e-6)


def test_printed_table(
    small_zip: Path, images: Tensor, inception: Inception, capsys: pytest.CaptureFixture[str]
) -> None:
    comparisons = compare(images, open_image_set(small_zip, "reference"), inception, 1, True)
    capsys.readouterr()
    module.report(comparisons)
    table = [line.rsplit(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()]
    found, scale = (values.numpy() for values in (comparisons["pixels"].found.distances, comparisons["pixels"].scale))
    numbers = [np.median(found), found.min(), np.median(scale), np.quantile(scale, 0.01), scale.min()]
    assert table[:6] == ["pixels", *(f"{number:.4g}" for number in numbers)]


def test_larger_reference_images_are_averaged(reference: Tensor, tmp_path: Path) -> None:
    save(tmp_path / "reference", reference.repeat_interleave(2, -1).repeat_interleave(2, -2))
    save(tmp_path / "images", reference[3:5])
    sets = [f"images={tmp_path}/images", f"reference={tmp_path}/reference"]
    assert run(*sets, f"destination={tmp_path}/new") == 0
    rows = [row for row in read(tmp_path / "new" / "neighbours.csv") if row["rank"] == "1" and row["space"] == "pixels"]
    assert [(row["neighbour"], row["distance"]) for row in rows] == [("03.png", "0"), ("04.png", "0")]


def test_smaller_reference_images_are_rejected(
    small_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "images", torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert run(f"images={tmp_path}/images", f"reference={small_zip}", f"destination={tmp_path}/new") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: reference: 'train/000.png' in")
    assert "is 16x16; it must be 32x32 or a whole multiple; " in error
    assert not (tmp_path / "new").exists()


def test_images_are_evenly_spaced_and_runs_are_deterministic(small_zip: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        sets = [f"images={small_zip}", f"reference={small_zip}", "subset=train", "count=2"]
        assert run(*sets, f"destination={tmp_path}/{name}") == 0
    rows = read(tmp_path / "one" / "neighbours.csv")
    assert [row["image"] for row in rows[::6]] == ["train/000.png", "train/012.png"]
    for file in ("neighbours.csv", "neighbours.png"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


@pytest.mark.parametrize(
    ("count", "nearest", "columns", "rows"), [(32, 3, 2, 16), (1, 1, 1, 1), (7, 3, 1, 7), (31, 1, 3, 11)]
)
def test_picture_is_about_square(
    count: int, nearest: int, columns: int, rows: int, small_zip: Path, reference: Tensor
) -> None:
    nothing = torch.zeros(count, nearest, dtype=torch.long)
    found = Neighbours(nothing.double(), nothing, nothing.bool())
    drawn = picture(reference[torch.arange(count) % 24], open_image_set(small_zip, "reference"), [found, found])
    column = 16 + 2 * (12 + nearest * 18 - 2)
    assert drawn.size == (columns * (column + analysis.COLUMN_GAP) - analysis.COLUMN_GAP, 18 * rows - 2)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("count=0", "count=0: must be at least 1"),
        ("nearest=0", "nearest=0: must be at least 1"),
        ("nearest=24", "nearest=24: must be less than the number of reference images, which is 24"),
        ("subset=nowhere", "reference={zip}: no images in its folder subset='nowhere'"),
        ("images=nowhere", "images=nowhere: no such file or folder"),
        ("reference=nowhere", "reference=nowhere: no such file or folder"),
        ("weights=nowhere.pth", "weights=nowhere.pth: no such file"),
        ("weights={zip}", "weights: {zip} is neither"),
        ("destination={zip}", "destination={zip}: cannot be created (File exists); choose another"),
        ("destination={zip}/new", "destination={zip}/new: cannot be created (Not a directory)"),
        ("mirrored=perhaps", "mirrored=perhaps: "),
        ("image=a", "unknown key 'image'; did you mean images?"),
    ],
)
def test_invalid_options_give_one_line(
    argument: str,
    message: str,
    small_zip: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if argument.startswith("weights"):
        monkeypatch.setattr(module, "Inception", Inception)
    argument, message = (text.replace("{zip}", str(small_zip)) for text in (argument, message))
    assert run(f"images={small_zip}", f"reference={small_zip}", f"destination={tmp_path}/new", argument) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {message}")
    assert output.err.count("\n") == 1
    assert output.out == ""  # before any work
    assert not (tmp_path / "new").exists()


def test_usage_names_every_option() -> None:
    shown = run_command("-m relay_diffusion.cli.neighbours", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    explained = {line.split()[0] for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert explained == {field.name for field in fields(NeighboursOptions)}


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make the directory of a run that was logged to W&B."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    directory = tmp_path / "training"
    logger = WandbRun("mine", "first", directory)
    directory.mkdir()
    (directory / "wandb_run.json").write_text(json.dumps(logger.run_record))
    return directory


@pytest.mark.slow
def test_the_nearest_images_go_to_a_wandb_run(
    images: Tensor, reference: Tensor, small_zip: Path, training: Path, tmp_path: Path
) -> None:
    samples = save(tmp_path / "samples", images)
    arguments = [f"images={samples}", f"reference={small_zip}", f"destination={tmp_path / 'out'}", "nearest=2"]
    assert run(*arguments, f"wandb={training}") == 0
    parts = records(tmp_path / "out")
    (row,) = rows_of(parts)
    assert (row["neighbours/picture.count"], row["neighbours/nearest.nrows"], row["images_seen"]) == (1, 3, 0)
    (started,) = [record["run"] for record in parts[0] if record["type"] == "run"]
    assert (started["run_id"], started["project"]) == ("first", "mine")
    files = files_of(parts[0], "run_table")
    table = json.loads(files["neighbours/nearest.table.json"].read_text())
    assert table["columns"] == [
        "image", "name", "nearest by features", "name by features", "distance by features", "nearest by pixels",
        "name by pixels", "distance by pixels",
    ]  # fmt: skip
    copied, mirrored, _ = table["data"]
    assert [copied[i] for i in (1, 3, 4, 6, 7)] == ["00.png", "train/005.png", 0, "train/005.png", 0]
    assert mirrored[7] == 0
    with Image.open(files[mirrored[5]["path"]]) as picture:
        assert torch.equal(torch.from_numpy(np.array(picture)).permute(2, 0, 1), reference[MIRRORED].flip(-1))


def test_errors_name_a_directory_without_a_wandb_run(
    small_zip: Path,
    training: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = [f"images={small_zip}", f"reference={small_zip}", f"destination={tmp_path / 'out'}"]
    assert run(*arguments, f"wandb={tmp_path}") == 2
    assert f"error: wandb={tmp_path}: has no wandb_run.json; give a run" in capsys.readouterr().err
    with run_lock(training, "run_dir"):
        assert run(*arguments, f"wandb={training}") == 2
    assert f"error: wandb={training}: {training} is training; repeat" in capsys.readouterr().err
    for damaged in ("{}", '{"id": "x"}'):
        (training / "wandb_run.json").write_text(damaged)
        assert run(*arguments, f"wandb={training}") == 2
        assert f"error: {training / 'wandb_run.json'} cannot be read: delete it" in capsys.readouterr().err
    (training / "wandb_run.json").write_text(json.dumps(WandbRun("mine", "first", training).run_record))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    wandb.teardown()  # it reads the environment anew
    assert run(*arguments, f"wandb={training}") == 2
    wandb.teardown()
    assert "error: W&B: WANDB_API_KEY invalid: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
