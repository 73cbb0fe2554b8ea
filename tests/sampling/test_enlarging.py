"""Enlarge a user's images: any size, names, colors, tiles, interruptions."""

import json
import re
from io import BytesIO
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from PIL import Image, ImageCms

from processes import Process, ended, until
from relay_diffusion.data.start_images import StartImages
from relay_diffusion.errors import UserError
from relay_diffusion.networks import EDMPreconditioner
from relay_diffusion.sampling.options import sampling_options
from relay_diffusion.sampling.run import build_relay, make_plan, sample
from support import PROJECT, run

TILES = ("relay.tile=64", "relay.overlap=16", "relay.tile_batch=16")


@pytest.fixture(scope="module")
def stage(tmp_path_factory, train_stage):
    """Overrides of a tiny stage 8 -> 16 with attention at its coarsest level only, because of whole images."""
    path = tmp_path_factory.mktemp("stage")
    train_stage(
        path, "stage=relay", "resolution=16", "stage.corruption.block=2", "network.attention_resolutions=[]",
        "network.channel_mult=[1,1,1]",
    )  # fmt: skip
    return (
        "relay=two_stages", "relay.stages.base.path=nowhere", f"relay.stages.relay.path={path}",
        "sampler@relay.stages.relay.sampler=multistep_relay", "trainer.accelerator=cpu",
    )  # fmt: skip


@pytest.fixture
def enlarge(configuration, stage, tmp_path):
    """Enlarge `start` by 2 with two evaluations, into `tmp_path / output`."""

    def into(start, *overrides, output="out"):
        return sample(
            configuration("sample", *stage, f"relay.start={start}", f"run_dir={tmp_path / output}", *overrides)
        )

    return into


def photo(path, size, seed=0, **options):
    """Write a smooth colorful image of `size` (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


def images(folder):
    """Path and size (width, height) of every image below a folder."""
    found = {}
    for path in sorted(Path(folder).rglob("*.png")):
        with Image.open(path) as image:
            found[path.relative_to(folder).as_posix()] = image.size
    return found


@pytest.mark.slow
def test_an_image_of_odd_size_is_enlarged_whole_and_in_tiles(enlarge, tmp_path, capsys, monkeypatch):
    batches = []
    forward = EDMPreconditioner.forward
    monkeypatch.setattr(
        EDMPreconditioner,
        "forward",
        lambda self, x, *rest, **named: batches.append(tuple(x.shape)) or forward(self, x, *rest, **named),
    )
    start = photo(tmp_path / "odd.jpg", (203, 317))
    enlarge(start, *TILES, output="tiles")
    assert images(tmp_path / "tiles/images") == {"odd.png": (406, 634)}
    assert batches == [*[(16, 3, 64, 64)] * 7, (13 * 9 % 16, 3, 64, 64)] * 2
    assert f"{2 * 13 * 9}/{2 * 13 * 9} tiles" in capsys.readouterr().out
    settings = json.loads((tmp_path / "tiles/settings.json").read_text())
    assert settings["tiles"] == {"relay": {"tile": 64, "overlap": 16}}
    assert settings["start"]["size"] == "own"
    batches.clear()
    enlarge(start, "relay.tile=1024", output="whole")
    assert images(tmp_path / "whole/images") == {"odd.png": (406, 634)}
    assert set(batches) == {(1, 3, 636, 408)}  # padded, as its three levels need
    with pytest.raises(UserError, match=r"different settings \(tiles"):
        enlarge(start, "relay.tile=1024", output="tiles")


def test_names_are_kept_in_folders_and_beside_equal_stems(enlarge, tmp_path):
    for number, (name, size) in enumerate(
        {"b.png": (20, 9), "a/b.jpg": (8, 8), "a/b.webp": (11, 30), "a/c/d.e.png": (8, 12)}.items()
    ):
        photo(tmp_path / "in" / name, size, number)
    results = enlarge(tmp_path / "in")
    assert results["images"] == results["sampled_now"] == 4
    expected = {"a/b.jpg.png": (16, 16), "a/b.webp.png": (22, 60), "a/c/d.e.png": (16, 24), "b.png": (40, 18)}
    assert images(tmp_path / "out/images") == expected
    assert not (tmp_path / "out/relay.png").exists()
    assert enlarge(tmp_path / "in")["sampled_now"] == 0
    enlarge(tmp_path / "in", "format=zip", "seeds=[0,3]")
    (tmp_path / "one").mkdir()
    assert enlarge(tmp_path / "in", "seeds=3", output="one")["images"] == 1
    with ZipFile(tmp_path / "out/images.zip") as archive:
        assert archive.read("b.png") == (tmp_path / "one/images/b.png").read_bytes()


def test_exif_orientation_is_applied(enlarge, tmp_path, capsys):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo(tmp_path / "in/turned.png", (24, 10), exif=exif)
    photo(tmp_path / "in/upright.png", (12, 10))
    enlarge(tmp_path / "in")
    assert images(tmp_path / "out/images") == {"turned.png": (20, 48), "upright.png": (24, 20)}
    assert "EXIF orientation applied to 1 image of relay.start" in capsys.readouterr().out
    enlarge(tmp_path / "in", "relay.start_exif=ignore", output="ignored")
    assert images(tmp_path / "ignored/images")["turned.png"] == (48, 20)


def test_damaged_profiles_are_ignored_and_reported(enlarge, tmp_path, capsys):
    photo(tmp_path / "in/odd.png", (12, 10), icc_profile=b"no profile")
    photo(
        tmp_path / "in/same.png",
        (12, 10),
        icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(),
    )
    photo(tmp_path / "plain/odd.png", (12, 10))
    enlarge(tmp_path / "in")
    assert "note: colors are not converted, because the ICC profile does not fit: odd.png\n" in capsys.readouterr().out
    enlarge(tmp_path / "plain", output="plain_out")
    damaged, plain = (tmp_path / name / "images/odd.png" for name in ("out", "plain_out"))
    assert damaged.read_bytes() == plain.read_bytes()


def test_profiles_apply_to_images_of_the_input_resolution_too(configuration, stage, tmp_path):
    for side, sizes in ((8, None), (9, [(9, 9)])):
        start = photo(tmp_path / f"{side}.png", (side, side))
        cfg = configuration("sample", *stage, f"relay.start={start}")
        plan = make_plan(sampling_options(cfg), build_relay(cfg.relay))
        assert plan.sizes == sizes
        assert isinstance(plan.start, StartImages)  # which converts colors


def test_transparency_and_missing_classes_are_reported(enlarge, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    Image.new("RGBA", (8, 8), (250, 0, 0, 100)).save(tmp_path / "in/half.png")
    enlarge(tmp_path / "in")
    printed = capsys.readouterr().out
    assert "note: transparency is composited on white: half.png\n" in printed
    assert "note: relay.start has no classes (dataset.json)" in printed


def test_too_many_repeats_are_reported(enlarge, tmp_path, monkeypatch):
    monkeypatch.setattr("relay_diffusion.utils.resolution.MAX_SIDE", 63)
    with pytest.raises(UserError, match=r"^relay\.repeat=3: would enlarge to 64x64, but at most .* and 63 on"):
        enlarge(photo(tmp_path / "a.png", (12, 9)), "relay.repeat=3")


def test_the_only_stage_of_a_relay_enlarges(configuration, stage, tmp_path):
    path = next(option for option in stage if option.startswith("relay.stages.relay.path=")).partition("=")[2]
    one = ["relay=one_stage", f"relay.stages.base.path={path}", "trainer.accelerator=cpu"]
    start = f"relay.start={photo(tmp_path / 'a.png', (12, 9))}"
    sample(configuration("sample", *one, start, f"run_dir={tmp_path / 'out'}"))
    assert images(tmp_path / "out/images") == {"a.png": (24, 18)}


def test_images_of_the_input_resolution_are_sampled_in_batches(enlarge, tmp_path):
    for number in range(3):
        photo(tmp_path / f"in/{number}.png", (8, 8), number)
    enlarge(tmp_path / "in", "class=-1")
    assert (tmp_path / "out/relay.png").exists()
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert "tiles" not in settings
    assert set(settings["start"]) == {"subset", "hash", "labels"}
    assert enlarge(tmp_path / "in", "class=-1")["sampled_now"] == 0
    enlarge(tmp_path / "in", "relay.start_size=own", output="own")
    for name in images(tmp_path / "out/images"):
        first, second = (np.asarray(Image.open(tmp_path / run / "images" / name), int) for run in ("out", "own"))
        assert abs(first - second).max() <= 1


def test_multiples_of_the_input_resolution_are_averaged_on_request(enlarge, tmp_path):
    photo(tmp_path / "in/a.png", (16, 16))
    enlarge(tmp_path / "in", output="own")
    assert images(tmp_path / "own/images") == {"a.png": (32, 32)}
    enlarge(tmp_path / "in", "relay.start_size=input", "class=-1", output="averaged")
    assert images(tmp_path / "averaged/images") == {"a.png": (16, 16)}
    enlarge(tmp_path / "in", "relay.resolution=32", "class=-1", output="large")
    assert images(tmp_path / "large/images") == {"a.png": (32, 32)}


def test_a_stage_is_applied_twice(enlarge, tmp_path):
    photo(tmp_path / "in/a.png", (9, 11))
    photo(tmp_path / "in/b.png", (8, 8))
    enlarge(tmp_path / "in", "relay.repeat=2")
    assert images(tmp_path / "out/images") == {"a.png": (36, 44), "b.png": (32, 32)}
    settings = json.loads((tmp_path / "out/settings.json").read_text())
    assert list(settings["stages"]) == ["relay", "relay_2"]


@pytest.mark.slow
def test_a_killed_run_continues_without_loss_or_duplicates(stage, enlarge, tmp_path):
    for number in range(9):
        photo(tmp_path / f"in/{number:02d}.jpg", (50 + number, 70), number)
    arguments = [PROJECT / "sample.py", *stage, f"relay.start={tmp_path / 'in'}", *TILES]
    command = [*arguments, f"run_dir={tmp_path / 'killed'}"]
    with ended([Process(tmp_path / "log.txt", command)]) as (process,):
        until(lambda: len(images_named(tmp_path / "killed/images")) >= 2, [process])
        process.kill()
        process.wait()
    kept = {path: path.read_bytes() for path in images_named(tmp_path / "killed/images")}
    assert 2 <= len(kept) < 9
    results = enlarge(tmp_path / "in", *TILES, output="killed")
    assert results["sampled_now"] == 9 - len(kept)
    enlarge(tmp_path / "in", *TILES, output="whole")
    finished = {path.name: path.read_bytes() for path in images_named(tmp_path / "killed/images")}
    assert finished == {path.name: path.read_bytes() for path in images_named(tmp_path / "whole/images")}
    assert sorted(finished) == [f"{number:02d}.png" for number in range(9)]
    assert all(path.read_bytes() == content for path, content in kept.items())
    assert not list((tmp_path / "killed/images").glob(".*"))


@pytest.mark.slow
def test_two_processes_enlarge_as_one(stage, enlarge, tmp_path):
    """Images of one tile and of several; the last image alone is made by both processes."""
    for number, size in enumerate([(20, 12), (70, 50), (9, 90), (40, 40), (8, 8)]):
        photo(tmp_path / f"in/sub/{number}.png", size, number)
    enlarge(tmp_path / "in", *TILES, output="one")
    expected = {path.name: path.read_bytes() for path in images_named(tmp_path / "one/images/sub")}
    assert sorted(expected) == [f"{number}.png" for number in range(5)]
    for seeds, count in (("seeds=0-3", 4), ("seeds=4", 5)):
        given = [*stage, *TILES, seeds, f"relay.start={tmp_path / 'in'}", f"run_dir={tmp_path / 'two'}"]
        done = run("sample.py", *given, "strategy=ddp_cpu")
        assert done.returncode == 0, done.stderr
        made = {path.name: path.read_bytes() for path in (tmp_path / "two/images").rglob("*.png")}
        assert made == {name: expected[name] for name in sorted(expected)[:count]}
    assert not list((tmp_path / "two/images").rglob(".*"))


def images_named(folder):
    """Return the finished files, without temporary ones."""
    return [path for path in Path(folder).glob("*.png") if not path.name.startswith(".")]


def animation(path):
    """Write a WebP of two frames."""
    frames = [Image.new("RGB", (20, 20), color) for color in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def cut_short(path):
    """Write two thirds of a PNG."""
    stream = BytesIO()
    Image.effect_noise((40, 40), 60).convert("RGB").save(stream, "PNG")
    path.write_bytes(stream.getvalue()[: len(stream.getvalue()) * 2 // 3])


@pytest.mark.parametrize(
    ("name", "write", "overrides", "message"),
    [
        ("x.png", lambda path: photo(path, (7, 90)), (), "is 7x90 .width x height.: must be at least 8x8"),
        ("x.png", lambda path: photo(path, (2100, 8)), ("relay.repeat=3",), "would become 16800x64 .*; crop or shrink"),
        ("x.png", lambda path: photo(path, (1200, 1200)), ("relay.repeat=3",), "9600x9600, but at most 89,478,485 pix"),
        ("x.webp", animation, (), "^relay.start: 'x.webp' in .* an animation; save the wanted frame as PNG, or"),
        ("x.png", cut_short, (), "^relay.start: 'x.png' in .* cannot be decoded"),
        ("x.jpg", lambda path: path.write_text("text"), (), "^relay.start: 'x.jpg' in .* is not a PNG"),
        ("x.png", lambda path: photo(path, (20, 10)), ("npz=true",), "^npz=True: needs images of one size"),
        ("x.png", lambda path: photo(path, (20, 10)), ("save_trajectory=2",), "^save_trajectory=2: needs images of"),
        ("x.png", lambda path: photo(path, (20, 10)), ("relay.tile=33",), "^relay.tile=33: must be divisible by 4"),
        ("x.png", lambda path: photo(path, (20, 10)), ("relay.tile=6",), "^relay.tile=6: is smaller than the network"),
        ("x.png", lambda path: photo(path, (20, 10)), ("relay.overlap=16",), "^relay.overlap=16: .* below the tile"),
        ("x.png", lambda path: photo(path, (20, 10)), ("relay.start_size=input", "class=0"), "12x10; it must be 8x8"),
        ("x.png", lambda path: photo(path, (20, 10)), ("class=5",), "^class=5 is not known to the model"),
    ],
)  # fmt: skip
def test_what_cannot_be_enlarged_is_reported_before_work_starts(enlarge, tmp_path, name, write, overrides, message):
    photo(tmp_path / "in/a.png", (12, 10))
    write(tmp_path / "in" / name)
    with pytest.raises(UserError, match=message) as raised:
        enlarge(tmp_path / "in", *overrides)
    assert "\n" not in re.sub(r"\s+$", "", str(raised.value))
    assert not (tmp_path / "out").exists()
