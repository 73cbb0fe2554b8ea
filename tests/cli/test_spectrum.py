"""Command `spectrum`: written files and messages."""

from __future__ import annotations

import csv
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from PIL import Image

from relay_diffusion.analysis import plots as spectrum_plots
from relay_diffusion.analysis.spectrum import block_power, mixed_power, ring_means, rings
from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.cli.spectrum import USAGE, SpectrumOptions, analyze
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.diffusion.pixels import to_float
from support import run as run_command

Rows = list[dict[str, str]]


def run(*arguments: str) -> int:
    return run_tool(arguments, USAGE, SpectrumOptions, analyze)


def read(path: Path) -> Rows:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def column(rows: Rows, name: str) -> torch.Tensor:
    return torch.tensor([float(row[name]) for row in rows if row[name]], dtype=torch.float64)


@pytest.fixture(scope="module")
def written(small_zip: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Rows, Rows]:
    """Write spectrum.csv and snr.csv of 24 images at 4 and 16 pixels."""
    folder = tmp_path_factory.mktemp("spectrum")
    options = [f"images={small_zip}", "resolutions=4,16", "sigmas=0.5,2", "plots=false", f"output={folder}/new"]
    assert run(*options) == 0
    assert sorted(path.name for path in (folder / "new").iterdir()) == ["snr.csv", "spectrum.csv"]
    return read(folder / "new" / "spectrum.csv"), read(folder / "new" / "snr.csv")


def test_spectrum_holds_the_images_power(written: tuple[Rows, Rows], small_zip: Path) -> None:
    rows, _ = written
    assert list(rows[0]) == ["frequency", "power_4", "power_16", "matching_factor"]
    assert column(rows, "frequency").tolist() == [ring / 2 for ring in range(22)]  # corners: 15 sqrt(2) = 21.2
    images = to_float(torch.stack([image for image, _ in ImageDataset(small_zip, 16)])).double()
    power = column(rows, "power_16")
    total = (power * torch.bincount(rings(16).flatten())).sum() / 256
    torch.testing.assert_close(total, images.square().mean(), rtol=1e-8, atol=0)
    assert len(column(rows, "power_4")) == len(column(rows, "matching_factor")) == 5
    means = images.mean((-1, -2))  # the mean is the only coefficient that averaging leaves as it is
    torch.testing.assert_close(column(rows, "power_4")[0], 16 * means.square().mean(), rtol=1e-8, atol=0)
    assert rows[0]["matching_factor"] == "4"


def test_snr_is_the_power_of_images_over_that_of_noise(written: tuple[Rows, Rows]) -> None:
    spectrum, rows = written
    assert list(rows[0]) == ["resolution", "noise", "sigma", "frequency", "snr"]
    found: dict[tuple[str, str, str], list[float]] = {}
    for row in rows:
        curve = found.setdefault((row["resolution"], row["noise"], row["sigma"]), [])
        assert float(row["frequency"]) == len(curve) / 2  # and so no curve comes twice
        curve.append(float(row["snr"]))
    small, large = column(spectrum, "power_4"), column(spectrum, "power_16")
    noise = {"block": ring_means(block_power(16, 4)), "white+block": ring_means(mixed_power(16, 4, 0.15))}
    expected = {("4", "white", "0.5"): small * 4, ("4", "white", "2"): small / 4}
    expected |= {("16", "white", "0.5"): large * 4, ("16", "white", "2"): large / 4, ("16", "white", "8"): large / 64}
    expected |= {("16", name, "0.5"): large * 4 / power for name, power in noise.items()}
    expected |= {("16", name, "2"): large / 4 / power for name, power in noise.items()}
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(torch.tensor(found[key], dtype=torch.float64), values, rtol=1e-7, atol=0)
    same = [found[key][0] for key in (("4", "white", "2"), ("16", "white", "8"), ("16", "block", "2"))]
    assert same == pytest.approx([same[0]] * 3)  # of the mean: large white noise of 4 sigma, or block noise of sigma


def test_images_are_spread_over_the_set(small_zip: Path, tmp_path: Path) -> None:
    assert run(f"images={small_zip}", "resolutions=4,16", "count=2", "plots=false", f"output={tmp_path}") == 0
    dataset = ImageDataset(small_zip, 16)
    images = to_float(torch.stack([dataset[index][0] for index in (0, 12)])).double()
    rows = read(tmp_path / "spectrum.csv")
    expected = (images.sum((-1, -2)) / 16).square().mean()
    torch.testing.assert_close(column(rows, "power_16")[0], expected, rtol=1e-8, atol=0)


def test_block_noise_can_be_chosen(written: tuple[Rows, Rows], small_zip: Path, tmp_path: Path) -> None:
    options = ["block=2", "block_strength=0.5", "plots=false", f"output={tmp_path}"]
    assert run(f"images={small_zip}", "resolutions=4,16", *options) == 0
    power = column(written[0], "power_16")
    rows = read(tmp_path / "snr.csv")
    for name, noise in [("block", block_power(16, 2)), ("white+block", mixed_power(16, 2, 0.5))]:
        snr = column([row for row in rows if row["noise"] == name], "snr")
        torch.testing.assert_close(snr, power / ring_means(noise), rtol=1e-7, atol=0)


def test_plots_draw_the_numbers(small_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    figures, save = {}, spectrum_plots._save
    monkeypatch.setattr(
        spectrum_plots, "_save", lambda figure, path: (figures.update({path.name: figure}), save(figure, path))
    )
    assert run(f"images={small_zip}", "resolutions=4,16", "sigmas=0.5,2", f"output={tmp_path}") == 0
    for name, panels in [("spectrum.png", 1), ("snr.png", 2)]:
        assert len(figures[name].axes) == panels
        with Image.open(tmp_path / name) as picture:
            assert picture.width > picture.height * 1.2 * panels
    powers, rows = read(tmp_path / "spectrum.csv"), read(tmp_path / "snr.csv")
    line = figures["spectrum.png"].axes[0].lines[1]
    assert list(line.get_xdata()) == [ring / 2 for ring in range(1, 16)]
    assert list(line.get_ydata()) == pytest.approx(column(powers, "power_16")[1:16].tolist(), rel=1e-7)
    for axes, sigma in zip(figures["snr.png"].axes, ["0.5", "2"], strict=True):
        mixed = column([row for row in rows if (row["noise"], row["sigma"]) == ("white+block", sigma)], "snr")
        assert list(axes.lines[4].get_ydata()) == pytest.approx(mixed[1:16].tolist(), rel=1e-7)


def test_csv_files_are_written_without_matplotlib(
    small_zip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run(f"images={small_zip}", "resolutions=4,16", f"output={tmp_path}") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["snr.csv", "spectrum.csv"]
    error = capsys.readouterr().err
    assert error.startswith(
        "error: plots=true needs matplotlib: `pip install -e '.[analysis]'`, or plots=false; the CSV"
    )
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("resolutions=16", "resolutions=16: give the small and the large"),
        ("resolutions=16,4", "resolutions=16,4: give"),
        ("resolutions=16,16", "resolutions=16,16: give"),
        ("resolutions=6,16", "resolutions=6,16: give"),
        ("resolutions=4,8,16", "resolutions=4,8,16: give"),
        ("resolutions=2.5,5", "resolutions=2.5,5: give"),
        ("resolutions=small,large", "resolutions=small,large: give"),
        ("resolutions=8,32", "images: 'train/000.png' in"),
        ("sigmas=", "sigmas=: give positive numbers"),
        ("sigmas=1,0", "sigmas=1,0: give"),
        ("sigmas=inf", "sigmas=inf: give"),
        ("sigmas=nan", "sigmas=nan: give"),
        ("count=0", "count=0: must be at least 1"),
        ("block=17", "block=17: must be 1 to 16"),
        ("block=-1", "block=-1: must be 1 to 16"),
        ("block_strength=-1", "block_strength=-1.0: must be 0 or more"),
        ("block_strength=nan", "block_strength=nan: must be 0 or more"),
        ("images=nowhere", "images=nowhere: no such file or folder"),
        ("image=a", "unknown key 'image'; did you mean images?"),
    ],
)
def test_mistakes_are_one_line(
    argument: str, message: str, small_zip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(f"images={small_zip}", "resolutions=4,16", "plots=false", f"output={tmp_path}/new", argument) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}")
    assert error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_usage_names_every_option() -> None:
    shown = run_command("-m relay_diffusion.cli.spectrum", "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    explained = {line.split()[0] for line in shown.stdout.splitlines() if line.startswith("  ")}
    assert explained == {field.name for field in fields(SpectrumOptions)}
