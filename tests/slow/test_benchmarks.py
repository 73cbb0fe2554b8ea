"""Benchmarks with results in the documentation."""

import csv
import importlib
import json
import sys

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from PIL import Image

from fake_inception import PixelFeatures, pixel_reference, use_small_features
from relay_diffusion.checkpoints.loading import load_relay, load_stage
from relay_diffusion.config import compose
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.image_sets import open_image_set
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.diffusion.pixels import to_float, to_uint8
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluator, FIDMetric, SFIDMetric
from relay_diffusion.models import Relay
from relay_diffusion.samplers import BlurringSampler, MultistepSampler
from support import PROJECT, run


def test_bicubic_enlarges_block_means_in_order(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / "real" / ("b" if number else "a")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    options = [
        f"source={tmp_path / 'real'}",
        f"destination={tmp_path / 'large.zip'}",
        "small=8",
        "subset=b",
        "factor=4",
    ]
    assert run("benchmarks/bicubic.py", *options).returncode == 0
    (made,) = open_image_set(tmp_path / "large.zip", "images").batches(9)
    assert made.shape == (2, 3, 32, 32)
    for image, original in zip(made, pixels[1:], strict=True):
        small = np.rint(original.reshape(8, 2, 8, 2, 3).mean((1, 3))).astype(np.uint8)
        expected = Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)
        difference = np.asarray(expected).astype(int) - image.permute(1, 2, 0).numpy()
        assert np.abs(difference).max() <= 2  # halves may be rounded either way


def test_bicubic_names_a_wrong_factor(tmp_path):
    result = run("benchmarks/bicubic.py", "source=demo", f"destination={tmp_path / 'a.zip'}", "factor=0")
    assert result.returncode == 2
    assert result.stderr == "error: factor=0: must be at least 1\n"


@torch.no_grad()
def test_denoising_prints_the_error_of_the_estimates():
    result = run("benchmarks/denoising.py", "count=3", "batch=2", "sigmas=0.5,2")
    assert result.returncode == 0, result.stderr
    images = ImageDataset(PROJECT / "demo/emoji-64.zip", 64, subset="heldout")
    chosen, _ = images.batch([0, 108, 217])  # of 326
    x = to_float(chosen)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    stage = load_stage(PROJECT / "demo/emoji_text_64").eval()
    printed = result.stdout.split("heldout")[1].replace(":", " ").split()
    for sigma, error in zip(printed[0::2], printed[1::2], strict=True):
        level = torch.full((len(x),), float(sigma))
        expected = (stage.denoiser(x + float(sigma) * noise, level) - x).square().mean().sqrt()
        assert float(error) == pytest.approx(float(expected), abs=1e-4)
    assert printed[0::2] == ["0.5", "2"]


@pytest.mark.parametrize("sigmas", ["much", "1,0", "nan"])
def test_denoising_names_wrong_sigmas(sigmas):
    result = run("benchmarks/denoising.py", f"sigmas={sigmas}")
    assert result.returncode == 2
    assert result.stderr == f"error: sigmas={sigmas}: need numbers above 0 with commas between them, e.g. 0.1,0.5\n"


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of benchmarks/ as a module."""
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if getattr(sys.modules[name], "__file__", None) and "benchmarks" in sys.modules[name].__file__:
            del sys.modules[name]


def relay_folder(folder, **stages):
    """Write a relay.json with the paths of stages by name; returns the folder."""
    content = {"format": 1, "stages": {name: {"path": str(path)} for name, path in stages.items()}}
    folder.mkdir(exist_ok=True)
    (folder / "relay.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def search(benchmark, small_zip, tmp_path, monkeypatch):
    """Run grids.py with pixels as features; returns the rows of its CSV."""
    monkeypatch.chdir(tmp_path)
    use_small_features(monkeypatch)
    grids = benchmark("grids")
    monkeypatch.setattr(grids, "Inception", lambda _: PixelFeatures())
    files = {"images": str(small_zip), "reference": str(small_zip), "subset": "", "output": "grids.csv"}

    def run(relay, **options):
        grids.run(grids.Options(relay=str(relay), **files, **options))
        return rows_of(tmp_path / "grids.csv")

    return run


def test_grids_writes_a_row_for_each_combination_of_both_samplers(search, relay_runs, tmp_path):
    relay = relay_folder(tmp_path / "relay", base=relay_runs / "base", relay=relay_runs / "relay")
    rows = search(relay, first="2/80/0.1/7/0", last="1,2/0.4/0.1/7/0+heun:2/0.4/0.1/7/0,0.2")
    assert [(row["last"], row["evaluations"]) for row in rows] == [
        ("1/0.4/0.1/7/0", "2+1"),
        ("2/0.4/0.1/7/0", "2+2"),
        ("heun:2/0.4/0.1/7/0", "2+3"),
        ("heun:2/0.4/0.1/7/0.2", "2+3"),
    ]
    assert all(float(row["seconds"]) > 0 for row in rows)
    assert len({row["fid"] for row in rows}) == len({row["sfid"] for row in rows}) == 4
    costs = [float(row["tflop"]) for row in rows]  # one more evaluation of the last stage costs the same everywhere
    assert costs[1] - costs[0] == pytest.approx(costs[2] - costs[1], rel=0.01)
    assert 0 < costs[1] < costs[2] == costs[3]
    assert search(relay, first="2/80/0.1/7/0", last="2/0.4/0.1/7/0") == rows  # existing rows are kept
    weights = rows[0]["weights"]
    (tmp_path / "grids.csv").write_text((tmp_path / "grids.csv").read_text().replace(weights, "0123456789ab"))
    with pytest.raises(UserError, match=r"grids.csv: the row relay=.* has other weights; use another output"):
        search(relay, first="2/80/0.1/7/0", last="2/0.4/0.1/7/0")


def test_grids_evaluates_the_images_of_the_relay(search, relay_runs, small_zip, tmp_path):
    relay = relay_folder(tmp_path / "relay", base=relay_runs / "base", relay=relay_runs / "relay")
    (row,) = search(relay, first="heun:4/80/0.002/7/0", last="2/0.4/0.1/7/0", seed=7, batch=5)
    last = {"_target_": "relay_diffusion.samplers.MultistepSampler", "steps": 2, "sigma_max": 0.4, "sigma_min": 0.1}
    loaded = load_relay(relay, samplers={"relay": last})  # the first stage has these 4 steps
    dataset = ImageDataset(small_zip, 16)
    with torch.autocast("cpu", torch.bfloat16):
        images = loaded.finish(loaded.sample(range(7, 31), dataset.labels))
    reference = dataset.batch(range(24))[0]
    evaluator = Evaluator(PixelFeatures(), pixel_reference(reference), {"fid": FIDMetric()})
    evaluator.update(images, torch.arange(24))
    assert float(row["fid"]) == pytest.approx(evaluator.compute()["fid"], abs=2e-3)


def test_grids_measures_a_file_of_points_on_some_real_images_and_names_the_best(search, relay_runs, tmp_path, capsys):
    relay = relay_folder(tmp_path / "relay", base=relay_runs / "base", relay=relay_runs / "relay")
    (tmp_path / "points.yaml").write_text(
        "enlarged:\n  multistep: &multistep {first: real, last: '2/0.4/0.1,0.2/7/0'}\n"
        "whole:\n  multistep: {<<: *multistep, first: heun:2/80/0.1/7/0}\n  again: {first: real, last: 2/0.4/0.1/7/0}\n"
    )
    rows = search(relay, points="points.yaml", count=12)
    assert [row["first"] for row in rows] == ["real", "real", "heun:2/80/0.1/7/0", "heun:2/80/0.1/7/0"]
    assert [row["evaluations"] for row in rows] == ["2", "2", "3+2", "3+2"]
    assert {row["images"] for row in rows} == {"12"}
    best = min(rows[:2], key=lambda row: float(row["fid"]))
    assert f"best for first=real: last={best['last']}\n" in capsys.readouterr().out


def test_grids_searches_a_cascade_and_a_single_stage(search, fit, relay_runs, tmp_path):
    fit("cascade", 4, "stage.corruption.block=2", "callbacks.grid.every_n_images=0", stage="cascade")
    last = "2/80/0.1/7/0+heun:2/80/0.1/7/0"
    cascade = relay_folder(tmp_path / "relay", base=relay_runs / "base", cascade=tmp_path / "cascade")
    search(cascade, first="2/80/0.1/7/0", last=last)
    rows = search(relay_folder(tmp_path / "single", base=relay_runs / "base"), first="noise", last=last)
    assert [row["evaluations"] for row in rows] == ["2+2", "2+3", "2", "3"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("last=2/0.4/0.5/7/0", "last=2/0.4/0.5/7/0: sigma_min=0.5: must be below sigma_max=0.4"),
        ("first=2/0.4", "first=2/0.4: must be steps/sigma_max/sigma_min/rho/s_noise"),
        ("first=noise", "first=noise: relay=demo/emoji needs grids or real"),
        ("points=none.yaml", "points=none.yaml: no such file"),
        ("points=benchmarks/emoji.yaml", "points=benchmarks/emoji.yaml: must hold panels, each with curves that have "
         "`first` and `last`"),
        ("output=docs/relay-vs-cascade.csv", "output=docs/relay-vs-cascade.csv: must have the columns relay,first,last,"
         "reference,subset,seed,images,evaluations,tflop,seconds,fid,sfid,device,weights; use another file"),
        ("count=0", "count=0: must be at least 1"),
        ("images=demo/emoji-64.zip", "relay=demo/emoji: takes text, which samples here have not; use a relay without "
         "text"),
    ],
)  # fmt: skip
def test_grids_names_wrong_options(option, message):
    result = run("benchmarks/grids.py", "relay=demo/emoji", option)
    assert result.returncode == 2
    assert result.stderr == f"error: {message}\n"


@pytest.mark.parametrize("grid", ["2/0.85/0.008/7/0.2", "14/0.85/0.008/7/0.2"])
def test_a_second_order_grid_is_the_sampler_with_these_levels(grid, benchmark):
    relay, base = (load_stage(PROJECT / f"demo/emoji_text_{size}") for size in (256, 64))
    made = benchmark("grids").sampler
    steps = int(grid.split("/")[0])
    for stage in (relay, base):
        heun, multistep = made(stage, "last", f"heun:{grid}"), made(stage, "last", grid)
        levels = [sigma for sigma in heun.sigmas if sigma > 0]  # EDM's sampler ends at 0
        assert levels == pytest.approx(multistep.sigmas)
        assert (heun.evaluations, multistep.evaluations) == (2 * steps - 1, steps)
    published = BlurringSampler(relay.corruption)  # 40 levels to 80, of which those below 0.9 are used
    assert made(relay, "last", f"heun:14/{published.sigmas[0]}/0.008/7/0.2").sigmas == pytest.approx(published.sigmas)


def test_the_grids_of_the_evaluations_are_valid(benchmark):
    grids = benchmark("grids")
    base, relay = (load_stage(PROJECT / f"demo/emoji_text_{size}") for size in (64, 256))
    for panel in grids.curves(str(PROJECT / "benchmarks/evaluations.yaml")).values():
        for points in panel.values():
            evaluations = set()
            for first, last in points:
                chosen = [] if first == "real" else [grids.sampler(base, "first", first)]
                chosen.append(grids.sampler(relay, "last", last))
                evaluations.add(tuple(sampler.evaluations for sampler in chosen))
            assert len(evaluations) == len(points)


def test_evaluations_plot_reads_points_of_grids(tmp_path, benchmark):
    grids, module = benchmark("grids"), benchmark("evaluations_plot")
    (tmp_path / "curves.yaml").write_text(
        "enlarged:\n  multistep: {first: real, last: '1,2/0.4/0.03/7/0'}\n"
        "  heun: {first: real, last: heun:2/0.4/0.03/7/0}\n"
        "whole:\n  multistep: {first: '5,9/120/0.06/3.5/0', last: 2/0.4/0.03/7/0}\n"
        "later:\n  multistep: {first: real, last: 9/0.4/0.03/7/0}\n"
    )
    points = [
        ("real", "1/0.4/0.03/7/0", 0, "1", 20), ("real", "2/0.4/0.03/7/0", 0, "2", 10),
        ("real", "2/0.4/0.03/7/0", 3000, "2", 12), ("real", "heun:2/0.4/0.03/7/0", 0, "3", 30),
        ("9/120/0.06/3.5/0", "2/0.4/0.03/7/0", 0, "9+2", 25), ("5/120/0.06/3.5/0", "2/0.4/0.03/7/0", 0, "5+2", 45),
    ]  # fmt: skip
    lines = [",".join(grids.COLUMNS)]
    lines += [
        f"emoji_classes,{first},{last},a.zip,train,{seed},2795,{n},0.1,0.001,{fid},50,GPU"
        for first, last, seed, n, fid in points
    ]
    (tmp_path / "points.csv").write_text("\n".join(lines) + "\n")
    options = module.Options(
        str(tmp_path / "points.csv"), str(tmp_path / "curves.yaml"), "fid", str(tmp_path / "a.png")
    )
    found = module.panels(options)
    drawn = {
        panel: [module.evaluations(rows, module.varied(chosen)) for rows in chosen["multistep"]]
        for panel, chosen in found.items()
    }
    assert drawn == {"enlarged": [1, 2], "whole": [5, 9], "later": []}
    arguments = [f"{name}={getattr(options, name)}" for name in ("points", "curves", "plot")]
    result = run("benchmarks/evaluations_plot.py", *arguments)
    assert result.returncode == 0, result.stderr
    expected = "| real | 2/0.4/0.03/7/0 | 2 | 0.10 | 0.00100 | 11.0 (10.0-12.0) | 50.0 (50.0-50.0) | 2 |"
    assert f"| enlarged | multistep {expected}" in result.stdout
    with Image.open(options.plot) as picture:
        assert picture.size == (1100, 484)  # two panels: nothing of the third is measured
    result = run("benchmarks/evaluations_plot.py", *arguments, "metric=kid")
    assert (result.returncode, result.stderr) == (2, "error: metric=kid: use fid or sfid\n")


def test_cross_attention_times_networks_with_and_without_text(benchmark, capsys):
    module = benchmark("cross_attention")
    module.run(module.Options(experiments="emoji_text_64", batch=1, tokens=2, repeats=1))
    lines = capsys.readouterr().out.splitlines()[1:]
    works = [f"emoji_text_64 {work}" for work in ("evaluate", "train")]
    starts = [f"{work}{end}" for work in works for end in (", with text", ", without text", ":")]
    assert [line.startswith(start) for line, start in zip(lines, starts, strict=True)] == [True] * 6


def test_tables_read_files_without_the_column_of_weights(benchmark, tmp_path):
    table = benchmark("measuring").Table
    path = tmp_path / "rows.csv"
    path.write_text("name,value\na,1\n")
    old = table(path, ["name"], ["name", "value"])
    assert old.find(["a"], "12ab") == {"name": "a", "value": "1", "weights": ""}
    assert old.find(["b"], "12ab") is None
    old.add(["b"], "12ab", {"value": "2"})
    assert path.read_text() == "name,value,weights\na,1,\nb,2,12ab\n"
    assert table(path, ["name"], ["name", "value"]).find(["b"], "12ab")["value"] == "2"
    with pytest.raises(UserError, match="must have the columns name,cost,weights; use another file"):
        table(path, ["name"], ["name", "cost"])


@pytest.fixture
def photos(tmp_path):
    """A zip of three images of 40x24 and 24x40, and one of training."""
    generator = np.random.default_rng(0)
    with image_zip(tmp_path / "photos.zip") as archive:
        for number, size in enumerate([(40, 24), (24, 40), (30, 30)]):
            image = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size)
            archive.add(f"heldout/photo{number}.png", image)
        archive.add("train/other.png", Image.new("RGB", (16, 16)))
    return tmp_path / "photos.zip"


@pytest.fixture
def enlarge(benchmark, photos, relay_runs, tmp_path, monkeypatch):
    """Run enlarging.py with pixels as features; returns the rows of its CSV."""
    monkeypatch.chdir(tmp_path)
    use_small_features(monkeypatch)
    module = benchmark("enlarging")
    monkeypatch.setattr(module, "Inception", lambda _: PixelFeatures())

    def run(methods, **options):
        options = {"stage": str(relay_runs / "relay"), "images": str(photos), "count": 60, "batch": 7} | options
        module.run(module.Options(methods=methods, output="points.csv", **options))
        return rows_of(tmp_path / "points.csv")

    return run


def test_enlarging_measures_interpolation_by_its_formulas(enlarge, photos):
    bicubic, lanczos = enlarge("bicubic+lanczos")
    dataset = ImageDataset(photos, 16, "heldout", random_crops=20)
    crops = dataset.batch(range(60))[0]
    small = torch.floor(crops.unflatten(3, (8, 2)).unflatten(2, (8, 2)).double().mean((3, 5)) + 0.5)
    pictures = [Image.fromarray(x.permute(1, 2, 0).to(torch.uint8).numpy()) for x in small]
    large = np.stack([np.asarray(picture.resize((16, 16), Image.Resampling.BICUBIC)) for picture in pictures])
    results = torch.from_numpy(large).permute(0, 3, 1, 2)
    errors = results.double() - crops
    assert float(bicubic["psnr"]) == pytest.approx(10 * np.log10(255**2 / float(errors.square().mean())), abs=2e-3)
    means = results.unflatten(3, (8, 2)).unflatten(2, (8, 2)).double().mean((3, 5))
    assert float(bicubic["agreement"]) == pytest.approx(float((means - small).square().mean().sqrt()), abs=2e-3)
    evaluator = Evaluator(PixelFeatures(), pixel_reference(crops), {"fid": FIDMetric(), "sfid": SFIDMetric()})
    evaluator.update(results, torch.arange(60))
    expected = evaluator.compute()
    assert [float(bicubic[name]) for name in ("fid", "sfid")] == pytest.approx(
        [expected["fid"], expected["sfid"]], abs=2e-3
    )
    assert 0.5 < float(bicubic["ssim"]) < 1
    assert float(lanczos["psnr"]) > float(bicubic["psnr"])
    assert [bicubic[name] for name in ("evaluations", "tflop", "device")] == ["0", "0", "CPU"]


def test_enlarging_measures_the_images_of_the_stage_and_keeps_rows(enlarge, photos, relay_runs):
    one, two = enlarge("1,2/0.4/0.1/7/0.2", count=6, seed=5)
    assert (one["evaluations"], two["evaluations"]) == ("1", "2")
    assert float(two["tflop"]) == pytest.approx(2 * float(one["tflop"]), rel=1e-3)
    dataset = ImageDataset(photos, 16, "heldout", random_crops=2)
    crops = dataset.batch(range(6))[0]
    small = torch.floor(crops.unflatten(3, (8, 2)).unflatten(2, (8, 2)).float().mean((3, 5)) + 0.5)
    stage = load_stage(relay_runs / "relay").eval()
    stage.sampler = MultistepSampler(stage.corruption, 2, 0.1, 0.4, 7, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        images = stage.sample((6, 3, 16, 16), range(5, 11), torch.full((6,), -1), to_float(small.to(torch.uint8)))
    error = (to_uint8(images).double() - crops).square().mean()
    assert float(two["psnr"]) == pytest.approx(10 * np.log10(255**2 / float(error)), abs=0.05)
    assert enlarge("2,1/0.4/0.1/7/0.2", count=6, seed=5) == [one, two]  # existing rows are kept
    assert len(enlarge("2/0.4/0.1/7/0.2", count=6, seed=6)) == 3


def test_enlarging_ties_block_means_to_the_input(enlarge):
    free, consistent = enlarge("1/0.4/0.1/7/0.2+consistent:1/0.4/0.1/7/0.2", count=6)
    assert [free["method"], consistent["method"]] == ["1/0.4/0.1/7/0.2", "consistent:1/0.4/0.1/7/0.2"]
    assert float(consistent["agreement"]) < float(free["agreement"]) / 4
    assert float(consistent["psnr"]) > float(free["psnr"])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("methods=nearest", "methods=nearest: must be steps/sigma_max/sigma_min/rho/s_noise"),
        ("methods=consistent:nearest", "methods=nearest: must be steps/sigma_max/sigma_min/rho/s_noise"),
        ("methods=2/0.4/0.5/7/0", "methods=2/0.4/0.5/7/0: sigma_min=0.5: must be below sigma_max=0.4"),
        ("stage=demo/emoji_text_64", "stage=demo/emoji_text_64: starts from noise; give a relay stage"),
        ("count=0", "count=0: must be at least 1"),
    ],
)
def test_enlarging_names_wrong_options(option, message):
    result = run("benchmarks/enlarging.py", "stage=demo/photos_256", "images=demo/emoji-64.zip", option)
    assert result.returncode == 2
    assert result.stderr == f"error: {message}\n"


def test_enlarging_plot_averages_seeds_and_joins_grids(enlarge, benchmark, tmp_path):
    for seed in (0, 1):
        rows = enlarge("bicubic+2,1/0.4/0.1/7/0.2+consistent:1/0.4/0.1/7/0.2", count=6, seed=seed)
    module = benchmark("enlarging_plot")
    points = module.averaged(tmp_path / "points.csv")
    psnr = [float(row["psnr"]) for row in rows if row["method"] == "2/0.4/0.1/7/0.2"]
    assert len(psnr) == 2
    assert points["2/0.4/0.1/7/0.2"]["psnr"] == pytest.approx(sum(psnr) / 2)
    found = {name: [point["evaluations"] for point in curve] for name, curve in module.curves(points).items()}
    assert found == {"bicubic": [0], "0.4/0.1/7/0.2": [1, 2], "consistent:0.4/0.1/7/0.2": [1]}
    result = run("benchmarks/enlarging_plot.py", f"points={tmp_path / 'points.csv'}", f"plot={tmp_path / 'a.png'}")
    assert result.returncode == 0, result.stderr
    assert f"| 1/0.4/0.1/7/0.2 | 1 | {points['1/0.4/0.1/7/0.2']['tflop']:.3f} |" in result.stdout
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (660, 506)
    enlarge("bicubic", count=5)
    with pytest.raises(UserError, match=r"points=.*: has rows of several stages or sets of crops"):
        module.averaged(tmp_path / "points.csv")


def test_enlarging_picture_shows_the_measured_crops(benchmark, photos, relay_runs, tmp_path):
    module = benchmark("enlarging_picture")
    options = module.Options(
        "photo2:3,photo0:0",
        str(relay_runs / "relay"),
        "lanczos+1/0.4/0.1/7/0",
        str(photos),
        picture=str(tmp_path / "a"),
    )
    dataset = ImageDataset(photos, 16, "heldout", random_crops=20)
    expected = dataset.batch([3 * 3 + 2, 0])[0]
    assert torch.equal(module.chosen_crops(dataset, options.crops), expected)
    module.run(options)
    with Image.open(tmp_path / "a") as picture:
        assert picture.size == (4 * 16 + 3 * 2, 2 * 16 + 2)
        original = np.asarray(picture.convert("RGB"))[:16, -16:].astype(int)
    assert np.abs(original - expected[0].permute(1, 2, 0).numpy()).mean() < 20
    for crop in ("photo9:0", "photo0", "photo0:x", "photo0:10000"):
        with pytest.raises(UserError, match=f"crops={crop}: must be NAME:NUMBER with one of photo0, photo1, photo2"):
            module.chosen_crops(dataset, crop)


@pytest.fixture
def compare(benchmark, relay_overrides, tmp_path, monkeypatch):
    """Run comparison.py for curves of a tiny relay with pixels as features; returns its rows."""
    use_small_features(monkeypatch)
    module = benchmark("comparison")
    given = [override for override in relay_overrides if not override.startswith(("run_dir", "trainer"))]
    given.append("metrics.evaluator.inception._target_=pixel_inception.pixels")

    def run(output, repeats=1, **curves):
        (tmp_path / "curves.yaml").write_text(
            "".join(f"{name}: ['{' '.join([*given, more])}']\n" for name, more in curves.items())
        )
        files = (str(tmp_path / "curves.yaml"), str(tmp_path / output))
        module.run(module.Options(*files, count=12, repeats=repeats, batch=8))
        return rows_of(tmp_path / output)

    return run


MULTISTEP = (
    "sampler@relay.stages.base.sampler=multistep relay.stages.base.sampler.steps=2 "
    "sampler@relay.stages.relay.sampler=multistep_relay relay.stages.relay.sampler.steps="
)


def without_seconds(rows):
    return sorted(str({**row, "seconds": None}) for row in rows)


def test_comparison_measures_the_same_whatever_it_samples_before(compare, capsys):
    together = compare("together.csv", repeats=2, a=f"{MULTISTEP}2,1", b="")
    assert [(row["curve"], row["evaluations"]) for row in together] == [("a", "2+2"), ("a", "2+1"), ("b", "7+3")] * 2
    assert all(float(row[name]) > 0 for row in together for name in ("tflop", "seconds", "fid", "sfid"))
    assert len({row["fid"] for row in together}) == len(together)  # no images of another point or repeat
    compare("alone.csv", b="")
    capsys.readouterr()
    alone = compare("alone.csv", b="", a=f"{MULTISTEP}1,2")  # existing rows are kept
    assert len(alone) == 3
    assert "alone.csv: kept 1 rows, 0 without the hash of their weights" in capsys.readouterr().out
    assert without_seconds(alone) == without_seconds(row for row in together if row["repeat"] == "0")


def test_comparison_refuses_rows_of_other_weights(compare, tmp_path):
    compare("points.csv", a="")
    text = (tmp_path / "points.csv").read_text()
    weights = text.strip().rpartition(",")[2]
    (tmp_path / "points.csv").write_text(text.replace(weights, "0123456789ab"))
    with pytest.raises(UserError, match=r"points.csv: the row curve=a .* repeat=0 images=12 has other weights"):
        compare("points.csv", a="", b=f"{MULTISTEP}1")
    assert len(rows_of(tmp_path / "points.csv")) == 1


def test_comparison_reports_missing_weights_before_sampling(benchmark, compare, monkeypatch):
    monkeypatch.setattr(benchmark("comparison"), "draw", None)
    with pytest.raises(InstantiationException, match="damaged"):
        compare("points.csv", a="metrics.evaluator.inception._target_=pixel_inception.damaged")


def test_comparison_ties_block_means_to_the_first_stage(compare):
    free, tied = (compare(f"{value}.csv", a=f"relay.consistency={value}")[0] for value in ("false", "true"))
    assert free["evaluations"] == tied["evaluations"]
    assert free["fid"] != tied["fid"]


def test_comparison_samples_first_stages_once_and_counts_their_time(benchmark, compare, monkeypatch):
    drawn = []

    def draw(stage, *arguments):
        drawn.append((stage.resolution, stage))
        seeds = arguments[1]
        return torch.zeros(len(seeds), 3, stage.resolution, stage.resolution), {8: 2.0, 16: 0.5}[stage.resolution]

    monkeypatch.setattr(benchmark("comparison"), "draw", draw)
    rows = compare("points.csv", repeats=2, a=f"{MULTISTEP}2,1", b="", c="relay.hand_over_sigma=1")
    assert {row["seconds"] for row in rows} == {"2.500000"}
    of_repeat = [8, 16, 16, 8, 16, 8, 16]  # a, a, b, c
    assert [resolution for resolution, _ in drawn] == of_repeat * 2
    assert len({id(stage) for _, stage in drawn}) == 2  # whose CUDA graphs are captured once


def test_commas_in_overrides_make_points(benchmark):
    expanded = benchmark("comparison").expanded
    assert expanded("relay=emoji a.b=[1,2] c=3,4 d=x,y") == [
        f"relay=emoji a.b=[1,2] c={c} d={d}" for c in (3, 4) for d in "xy"
    ]


def test_curves_of_the_emoji_are_valid_overrides(benchmark):
    options = benchmark("comparison").Options(points=1, curves=str(PROJECT / "benchmarks/emoji.yaml"))
    for _, overrides in benchmark("comparison").points(options):
        cfg = compose("sample", ["mode=evaluate", *overrides.split()])
        assert cfg.relay.stages.base.path


def test_comparison_plot_compares_points_of_the_same_repeats(benchmark):
    module = benchmark("comparison_plot")

    def rows(*repeats):
        return [{"repeat": repeat} for repeat in repeats]

    groups = {
        ("a", "x"): rows("0", "1", "2"),
        ("a", "y"): rows("1", "0"),
        ("b", "x"): rows("2", "1"),
        ("c", "x"): rows("2"),
    }
    chosen = module.with_common_repeats(groups, ["a", "b"])
    assert chosen == {point: rows("1") for point in (("a", "x"), ("a", "y"), ("b", "x"))}
    with pytest.raises(
        UserError, match="the points of a, b, c have no repeat in common; choose some curves, as curves=A,B"
    ):
        module.with_common_repeats(groups, ["a", "b", "c"])


def test_comparison_plot_draws_quality_against_operations_and_seconds(tmp_path):
    options = [f"points={PROJECT / 'docs/relay-vs-cascade.csv'}", f"plot={tmp_path / 'a.png'}"]
    result = run("benchmarks/comparison_plot.py", *options, "curves=relay_second_order,single_second_order")
    assert result.returncode == 0, result.stderr
    assert (
        "| relay_second_order | relay.stages.base.path=outputs/emoji/base sampler@relay.stages.base.sampler=edm "
        "sampler@relay.stages.relay.sampler=blurring relay.stages.relay.sampler.steps=40 | 47+27 | 1.32 | 0.0099 |"
        in result.stdout
    )
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (1210, 880)
    result = run("benchmarks/comparison_plot.py", *options, "curves=relay,none")
    assert result.returncode == 2
    assert result.stderr.startswith("error: curves=none is not in ")


def test_sampling_compares_the_command_with_its_network(benchmark, relay_runs, monkeypatch, capsys):
    sampling = benchmark("sampling")
    of_command, runs = sampling.seconds_of_command, []

    def seconds_of_command(options, count):  # one real run, because a difference of real times is random
        runs.append((count, bool(runs) or of_command(options, 2) > 0))
        return {4: 2.0, 10: 5.0}[count]

    monkeypatch.setattr(sampling, "seconds_of_command", seconds_of_command)
    monkeypatch.setattr(sampling.subprocess, "run", lambda command, **_: run(*command[1:]))
    paths = " ".join(f"relay.stages.{name}.path={relay_runs / name}" for name in ("base", "relay"))
    sampling.run(
        sampling.Options("two_stages", f"{paths} picture=0", 10, 2, "zip", precision="32-true", accelerator="cpu")
    )
    assert runs == [(4, True), (10, True)]
    *_, setting, whole, without_start, network = capsys.readouterr().out.splitlines()
    assert setting == "two_stages, 10 images in batches of 2, zip"
    assert whole.split()[:5] == ["sample.py", "5.0", "s", "2.0", "images/s"]
    assert without_start.removeprefix("sample.py without its start").split()[:4] == ["3.0", "s", "2.0", "images/s"]
    assert network.startswith("network alone")
    assert network.endswith("1.000 of the network")
    speed = float(network.removeprefix("network alone").split()[2])
    ratio = float(without_start.split()[-4])
    assert ratio == pytest.approx(2 / speed, abs=0.001 + 0.05 * 2 / speed**2)  # both are rounded


def test_sampling_gives_the_network_the_prompts_of_the_command(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from text_relays import export_text_relay
    from tiny_encoders import save_encoder

    root = export_text_relay(tmp_path / "relay", save_encoder(tmp_path / "encoder", "bert"))
    overrides = [f"relay.stages.{name}.path={root / name}" for name in ("base", "relay")]
    overrides += ["relay.stages.base.changes.guidance_scale=2", "prompt=[fox,light]"]
    sampling, sampled = benchmark("sampling"), []
    options = sampling.Options("two_stages", " ".join(overrides), 6, 2, precision="32-true", accelerator="cpu")
    monkeypatch.setattr(Relay, "finish", lambda _, images: sampled.append(images))
    cfg = compose("sample", sampling.settings(options, options.count))
    assert sampling.seconds_of_network(options, cfg) > 0
    relay = load_relay({name: root / name for name in ("base", "relay")}, changes={"base": {"guidance_scale": 2.0}})
    assert torch.equal(sampled[1], relay.sample([2, 3], prompt=["fox", "light"]))


def test_sampling_names_wrong_options():
    for option, message in [
        ("count=300", "count=300: must be a multiple of batch=256, at least 768"),
        ("count=512", "count=512: must be a multiple of batch=256, at least 768"),
        ("repeats=0", "repeats=0: must be at least 1"),
        ("format=gif", "format=gif: use png or zip"),
    ]:
        result = run("benchmarks/sampling.py", option)
        assert result.returncode == 2
        assert result.stderr == f"error: {message}\n"


@pytest.fixture
def emoji_zip(tmp_path):
    """Eight emoji of 16x16 in two styles; each is one color, inverted in the second style."""
    colors = np.random.default_rng(0).integers(0, 256, (8, 3))
    with image_zip(tmp_path / "emoji.zip") as archive:
        for style in ("flat", "noto"):
            for number, color in enumerate(colors):
                pixels = np.broadcast_to(color if style == "flat" else 255 - color, (16, 16, 3)).astype(np.uint8)
                captions = [f"emoji {number}", f"emoji {number}, {style} style"]
                name = f"{'train' if number < 5 else 'heldout'}/{style}/{number}.png"
                archive.add(name, Image.fromarray(pixels), captions=captions)
    return tmp_path / "emoji.zip"


def test_prompt_fidelity_measures_samples_beside_real_images(benchmark, emoji_zip, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    from text_relays import export_text_relay
    from tiny_encoders import save_encoder

    use_small_features(monkeypatch)
    root = export_text_relay(tmp_path / "relay", save_encoder(tmp_path / "encoder", "bert"))
    overrides = [
        *(f"relay.stages.{name}.path={root / name}" for name in ("base", "relay")),
        f"metrics.reference.cache={tmp_path / 'cache'}",
        "metrics.evaluator.inception._target_=pixel_inception.pixels",
    ]
    module = benchmark("prompt_fidelity")
    options = module.Options(
        str(emoji_zip), "heldout", "emoji", " ".join(overrides), guidance="1,3", resolution=16, batch=2,
        precision="32-true", output=str(tmp_path / "rows.csv"),
    )  # fmt: skip
    module.run(options)
    rows = rows_of(tmp_path / "rows.csv")
    assert [(row["queries"], row["guidance"], row["style"], row["count"]) for row in rows] == [
        *((queries, "", style, "3") for style in ("flat", "noto") for queries in ("other styles", "targets", "chance")),
        *(("samples", scale, style, "3") for scale in ("1.0", "3.0") for style in ("flat", "noto")),
    ]
    for row in rows:
        assert 0 <= float(row["top1"]) <= float(row["top5"]) <= float(row["top10"]) <= 100
        assert bool(row["fid"]) == bool(row["sfid"]) == (row["queries"] in ("samples", "targets"))
        if row["queries"] == "targets":
            assert float(row["top1"]) == 100
        if row["queries"] == "chance":
            assert [float(row[name]) for name in ("top1", "top5", "top10")] == [12.5, 62.5, 100]
    text = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text(text.replace(rows[-1]["weights"], "0123456789ab"))
    with pytest.raises(UserError, match=r"rows.csv: the row queries=samples .* has other weights; use another output"):
        module.run(options)


@pytest.mark.parametrize("targets", [1, 2])
def test_chance_is_that_of_random_order(benchmark, targets):
    module = benchmark("prompt_fidelity")
    generator = torch.Generator().manual_seed(0)
    queries, gallery = torch.randn(4000, 20, generator=generator), torch.eye(20)
    wanted = torch.arange(20).expand(4000, 20) < targets
    ranks = module.target_ranks(queries, gallery, wanted)
    found = [100 * (ranks <= count).double().mean().item() for count in (1, 5, 10)]
    assert module.chance(20, [targets] * 3) == pytest.approx(found, abs=3)


def test_ranks_of_targets(benchmark):
    rank = benchmark("prompt_fidelity").target_ranks
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.0]])
    queries = torch.tensor([[5.0, 0.1]]).expand(4, 2)
    assert rank(queries, gallery, torch.eye(4, dtype=torch.bool)).tolist() == [1, 4, 3, 1]  # length does not matter
    assert rank(queries[:1], gallery, torch.tensor([[False, True, True, False]])).tolist() == [3]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("subset=x", "^subset=x: use heldout, train"),
        ("guidance=0", "^guidance=0: need numbers above 0"),
        ("batch=0", "^batch=0: must be at least 1"),
    ],
)
def test_prompt_fidelity_names_wrong_options(benchmark, emoji_zip, tmp_path, option, message):
    module = benchmark("prompt_fidelity")
    key, value = option.split("=")
    options = module.Options(str(emoji_zip), relay="", resolution=16, output=str(tmp_path / "rows.csv"))
    setattr(options, key, type(getattr(options, key))(value))
    with pytest.raises(UserError, match=message):
        module.run(options)


def test_prompt_picture_has_a_row_for_each_prompt(benchmark, emoji_zip, tmp_path):
    """The first caption of each emoji is its prompt, which it has in two styles."""
    module = benchmark("prompt_picture")
    options = module.Options(str(emoji_zip), side=32, columns=2, picture=str(tmp_path / "prompts.webp"))
    parts = module.rows(options)
    assert len(parts) == 8
    pixels = np.asarray(parts[0])[-16]  # two images of 32 pixels, 4 pixels between them
    assert (255 - pixels[16] == pixels[36 + 16]).all()
    module.run(options)
    width, height = parts[0].size
    with Image.open(tmp_path / "prompts.webp") as picture:
        assert picture.size == (2 * (width + 12), 4 * (height + 12))


def test_prompt_picture_names_wrong_options():
    result = run("benchmarks/prompt_picture.py", "images=demo/emoji-64.zip", "columns=0")
    assert (result.returncode, result.stderr) == (2, "error: columns=0: must be at least 1\n")


def test_data_compares_all_formats():
    options = ["images=4", "stored=16", "resolution=16", "batch=2", "batches=1", "repeats=1", "cached=1"]
    result = run("benchmarks/data.py", *options)
    assert result.returncode == 0, result.stderr
    speeds = [line.split(",")[0].split()[0] for line in result.stdout.splitlines() if " images/s (" in line]
    assert speeds == [*("zip", "folder", "parquet", "shards") * 2, "cached"]
