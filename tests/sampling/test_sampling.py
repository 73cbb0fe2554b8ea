"""Sample and evaluate from a config."""

import io
import json
import signal
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fake_inception import use_small_features
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.metrics import Evaluator
from relay_diffusion.models.relay import Relay
from relay_diffusion.sampling.options import sampling_options
from relay_diffusion.sampling.run import build_relay, make_plan, sample
from relay_diffusion.utils.distributed import SIGNALS


@pytest.fixture
def evaluate(monkeypatch, relay_overrides):
    """Return overrides for an evaluation with pixels as features."""
    use_small_features(monkeypatch)
    return [*relay_overrides, "mode=evaluate", "metrics.evaluator.inception._target_=pixel_inception.pixels"]


def pngs(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("seed*.png")}


def test_sampling_resumes_and_does_not_depend_on_the_batch(configuration, relay_overrides, tmp_path):
    sample(configuration("sample", *relay_overrides, "seeds=0-6", "batch_size=7"))
    whole = pngs(tmp_path / "samples/images")
    assert len(whole) == 7
    assert (tmp_path / "samples/relay.png").exists()
    other = [f"run_dir={tmp_path / 'other'}"]
    assert sample(configuration("sample", *relay_overrides, *other, "seeds=2-4", "batch_size=2"))["sampled_now"] == 3
    assert sample(configuration("sample", *relay_overrides, *other, "seeds=0-6", "batch_size=3"))["sampled_now"] == 4
    assert pngs(tmp_path / "other/images") == whole


def test_a_run_resumes_with_another_compression(configuration, relay_overrides, tmp_path):
    """It changes the size of new files, but no pixel."""
    sample(configuration("sample", *relay_overrides, "seeds=0-1", "batch_size=2", "png_compression=0"))
    first = pngs(tmp_path / "samples/images")
    options = ["seeds=0-2", "batch_size=2", "png_compression=9"]
    assert sample(configuration("sample", *relay_overrides, *options))["sampled_now"] == 1
    both = pngs(tmp_path / "samples/images")
    assert first.items() <= both.items()
    sample(configuration("sample", *relay_overrides, *options, f"run_dir={tmp_path / 'small'}"))
    for name, content in pngs(tmp_path / "small/images").items():
        assert (content == both[name]) == (name not in first)
        with Image.open(io.BytesIO(content)) as small, Image.open(io.BytesIO(both[name])) as other:
            assert small.tobytes() == other.tobytes()


def test_a_full_disk_stops_sampling(configuration, relay_overrides, tmp_path, monkeypatch):
    """The error of a writing thread is raised before the second batch is followed by a third."""
    (tmp_path / "samples/images").mkdir(parents=True)
    (tmp_path / "samples/images/00000000").write_text("a file where a folder must be")
    steps, others = [], set(threading.enumerate())  # threads of other tests
    predict = Relay.predict_step
    monkeypatch.setattr(Relay, "predict_step", lambda self, *a: steps.append(1) or predict(self, *a))
    with pytest.raises(UserError, match=r"^[^\n]*seed0000000.\.png cannot be written: (Not a directory|File exists)$"):
        sample(configuration("sample", *relay_overrides, "seeds=0-3", "batch_size=1"))
    assert len(steps) == 2
    assert set(threading.enumerate()) <= others


def test_images_of_other_settings_are_not_mixed(configuration, relay_overrides):
    sample(configuration("sample", *relay_overrides, "seeds=0-1"))
    with pytest.raises(UserError, match="different settings"):
        sample(configuration("sample", *relay_overrides, "relay.stages.relay.changes.sampler.s_noise=0.1"))


@pytest.mark.slow
def test_evaluation_covers_all_images_after_an_interruption(configuration, relay_overrides, evaluate, tmp_path):
    whole = sample(configuration("sample", *evaluate, "seeds=0-7"))
    stored = json.loads((tmp_path / "samples/metrics.json").read_text())
    assert stored["fid"] == whole["fid"] > 0
    assert stored["images"] == 8
    assert stored["evaluation"]["reference"]["images"] == 24
    assert stored["settings"]["stages"]["relay"]["network_evaluations"] > 1
    assert stored["image_size"] == stored["evaluation"]["reference"]["resolution"] == [16, 16]
    assert stored["evaluation"]["reference"]["averaging"] == [1]
    assert [line.partition(":")[0] for line in stored["warnings"]] == [
        "sFID is unreliable with 8 generated and 24 reference images"
    ]
    other = [f"run_dir={tmp_path / 'other'}"]
    sample(configuration("sample", *relay_overrides, *other, "seeds=0-4"))
    parts = sample(configuration("sample", *evaluate, *other, "seeds=0-7"))
    assert parts["sampled_now"] == 3
    again = sample(configuration("sample", *evaluate, *other, "seeds=0-7"))  # nothing left to sample
    for results in (parts, again):
        assert results["fid"] == pytest.approx(whole["fid"], rel=1e-3)
        assert results["sfid"] == pytest.approx(whole["sfid"], rel=1e-3)


@pytest.mark.slow
def test_one_class_a_list_or_none(configuration, relay_overrides, tmp_path):
    for i, (chosen, labels) in enumerate([("light", [1, 1, 1]), ("[light,0]", [1, 0, 1]), ("null", [0, 1, 0])]):
        sample(
            configuration(
                "sample", *relay_overrides, f"class={chosen}", "seeds=0-2", "format=zip", f"run_dir={tmp_path / str(i)}"
            )
        )
        assert ImageDataset(tmp_path / str(i) / "images.zip", 16).labels == labels


@pytest.mark.slow
def test_sampling_resumes_with_packed_images(configuration, relay_overrides, tmp_path):
    sample(configuration("sample", *relay_overrides, "seeds=0-4", f"run_dir={tmp_path / 'whole'}"))
    options = [*relay_overrides, "format=zip", "npz=true"]
    assert sample(configuration("sample", *options, "seeds=0-2"))["sampled_now"] == 3
    assert not (tmp_path / "samples/images").exists()
    results = sample(configuration("sample", *options, "seeds=0-4"))
    assert results["sampled_now"] == 2
    packed = ImageDataset(tmp_path / "samples/images.zip", 16)
    whole = pngs(tmp_path / "whole/images")
    assert [Path(name).name for name in packed.names] == sorted(whole)
    with np.load(tmp_path / "samples/images.npz", allow_pickle=False) as arrays:
        assert arrays["arr_1"].tolist() == [0, 1, 0, 1, 0]
        for (image, _), pixels, name in zip(packed, arrays["arr_0"], sorted(whole), strict=True):
            np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), pixels)
            with Image.open(tmp_path / "whole/images/00000000" / name) as picture:
                np.testing.assert_array_equal(np.asarray(picture), pixels)


def test_only_the_first_stages(configuration, relay_overrides, tmp_path):
    sample(configuration("sample", *relay_overrides, "relay.last=base", "seeds=0-1"))
    with Image.open(tmp_path / "samples/images/00000000/seed00000001.png") as image:
        assert image.size == (8, 8)


def test_given_images_are_enlarged_under_their_names(configuration, relay_overrides, tmp_path):
    """Enlarging equals the whole relay, without the first checkpoint."""
    small = tmp_path / "small"
    sample(configuration("sample", *relay_overrides, "relay.last=base", "seeds=0-2", f"run_dir={small}"))
    start = [*relay_overrides, "relay.stages.base.path=nowhere", f"relay.start={small / 'images'}"]
    assert ImageDataset(small / "images", 8).labels == [0, 1, 0]  # their classes are taken over
    results = sample(configuration("sample", *start, f"run_dir={tmp_path / 'large'}"))
    assert results["images"] == 3
    names = sorted(path.relative_to(small / "images") for path in (small / "images").rglob("*.png"))
    assert sorted(p.relative_to(tmp_path / "large/images") for p in (tmp_path / "large/images").rglob("*.png")) == names
    with Image.open(tmp_path / "large/images" / names[0]) as image:
        assert image.size == (16, 16)
    assert (tmp_path / "large/relay.png").exists()
    one = sample(configuration("sample", *start, "seeds=1", f"run_dir={tmp_path / 'one'}"))
    assert one["images"] == 1
    assert pngs(tmp_path / "one/images").items() <= pngs(tmp_path / "large/images").items()


def test_the_error_of_the_block_means_is_reported(configuration, relay_overrides, evaluate, tmp_path, capsys):
    generator, small = np.random.default_rng(0), {}
    (tmp_path / "small").mkdir()
    for name in ("a", "b", "c"):
        small[name] = generator.integers(96, 160, (8, 8, 3)).astype(np.uint8)
        Image.fromarray(small[name]).save(tmp_path / f"small/{name}.png")
    start = [f"relay.start={tmp_path / 'small'}", "class=-1"]

    def by_hand(folder):
        squares = []
        for name, pixels in small.items():
            with Image.open(folder / f"images/{name}.png") as image:
                means = np.asarray(image).reshape(8, 2, 8, 2, 3).mean((1, 3))
            squares.append((means - pixels) ** 2)
        return np.sqrt(np.mean(squares))

    first = ["seeds=0", f"output={tmp_path / 'free'}"]
    sample(configuration("sample", *relay_overrides, *start, *first))
    results = sample(configuration("sample", *relay_overrides, *start, *first[1:]))  # all images, not the two new ones
    assert results["sampled_now"] == 2
    assert results["block_mean_error"] == pytest.approx(by_hand(tmp_path / "free"))
    assert f"RMS error {results['block_mean_error']:.2f} gray levels against relay.start" in capsys.readouterr().out
    tied = [f"output={tmp_path / 'tied'}", "relay.consistency=true"]
    sample(configuration("sample", *evaluate, *start, *tied))
    stored = json.loads((tmp_path / "tied/metrics.json").read_text())
    assert stored["block_mean_error"] == pytest.approx(by_hand(tmp_path / "tied"))
    assert stored["block_mean_error"] < results["block_mean_error"] / 2  # the range of 8 bits cuts off some detail
    assert stored["settings"]["consistency"] is True
    with pytest.raises(UserError, match="consistency"):
        sample(configuration("sample", *relay_overrides, *start, *tied[:1]))
    noise = sample(configuration("sample", *relay_overrides, "seeds=0", f"output={tmp_path / 'noise'}"))
    assert "block_mean_error" not in noise


def test_a_part_of_the_given_images(configuration, relay_overrides, tmp_path):
    for name in ("a/1.png", "b/1.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    start = [*relay_overrides, f"relay.start={tmp_path}", "class=-1"]
    sample(configuration("sample", *start, "relay.start_subset=b", f"run_dir={tmp_path / 'run'}"))
    images = tmp_path / "run/images"
    assert [path.relative_to(images).as_posix() for path in images.rglob("*.png")] == ["b/1.png"]
    with pytest.raises(UserError, match=r"relay\.start=.*: no images in its folder subset='c'; available: a, b"):
        sample(configuration("sample", *start, "relay.start_subset=c"))


@pytest.mark.slow
def test_a_single_image_is_enlarged_under_its_name(configuration, relay_overrides, tmp_path):
    Image.effect_noise((16, 16), 60).convert("RGB").save(tmp_path / "photo.PNG")
    (tmp_path / "beside.png").write_bytes(b"not looked at")
    start = [*relay_overrides, f"relay.start={tmp_path / 'photo.PNG'}", "class=-1", "relay.start_size=input"]
    assert sample(configuration("sample", *start, f"run_dir={tmp_path / 'run'}"))["images"] == 1
    assert [path.name for path in (tmp_path / "run/images").iterdir()] == ["photo.png"]
    with pytest.raises(UserError, match=r"relay\.start=.*photo\.PNG: no images in .* subset='a'; available: none"):
        sample(configuration("sample", *start, "relay.start_subset=a"))
    with pytest.raises(UserError, match=r"seeds=1: relay\.start=.*photo\.PNG holds 1 images, numbers 0 to 0"):
        sample(configuration("sample", *start, "seeds=1"))
    (tmp_path / "text.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"^relay\.start: '.*text\.jpg' is not a PNG, WebP or JPEG image"):
        sample(configuration("sample", *relay_overrides, f"relay.start={tmp_path / 'text.jpg'}", "class=-1"))
    Image.new("RGB", (12, 8)).save(tmp_path / "wide.png")
    with pytest.raises(UserError, match=r"relay\.start: '.*wide\.png' is 12x8; it must be 8x8 .*cli\.convert_images"):
        sample(configuration("sample", *relay_overrides, f"relay.start={tmp_path / 'wide.png'}", *start[-2:]))


@pytest.mark.slow
def test_starting_images_are_rotated_by_exif(configuration, relay_overrides, tmp_path, capsys):
    upright, stored = tmp_path / "upright", tmp_path / "stored"
    for number in range(3):
        image = Image.effect_noise((8, 8), 80).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = 6 if number else 1
        for folder, turn, options in [(upright, None, {}), (stored, Image.Transpose.ROTATE_90, {"exif": exif})]:
            folder.mkdir(exist_ok=True)
            turned = image.transpose(turn) if turn is not None and number else image
            turned.save(folder / f"{number}.png", **options)
    for name, start, more in [("a", upright, []), ("b", stored, []), ("c", stored, ["relay.start_exif=ignore"])]:
        options = [f"relay.start={start}", "class=-1", f"run_dir={tmp_path / name}", *more]
        sample(configuration("sample", *relay_overrides, *options))
        said = "EXIF orientation applied to 2 images of relay.start; relay.start_exif=ignore keeps them as stored"
        assert (said in " ".join(capsys.readouterr().out.split())) == (name == "b")
    made = {name: [(tmp_path / name / f"images/{k}.png").read_bytes() for k in range(3)] for name in "abc"}
    assert made["a"] == made["b"]
    assert [one == other for one, other in zip(made["a"], made["c"], strict=True)] == [True, False, False]
    options = [f"relay.start={stored}", "class=-1", f"run_dir={tmp_path / 'c'}"]
    with pytest.raises(UserError, match=r"holds images with different settings \(start\.hash"):
        sample(configuration("sample", *relay_overrides, *options))


@pytest.mark.parametrize("side", [8, 9])  # the input size of the relay, and another one
def test_given_images_have_their_classes_or_none(configuration, relay_overrides, tmp_path, side):
    Image.new("RGB", (side, side)).save(tmp_path / "a.png")
    start = [*relay_overrides, f"relay.start={tmp_path}"]

    def labels(*options):
        cfg = configuration("sample", *start, *options)
        return make_plan(sampling_options(cfg), build_relay(cfg.relay)).labels

    assert labels() == labels("class=-1") == [-1]
    (tmp_path / "dataset.json").write_text('{"labels": [["a.png", 0]], "classes": ["light"]}')
    with pytest.raises(UserError, match="other classes than the model"):
        labels()
    assert labels("class=-1") == [-1]
    (tmp_path / "dataset.json").write_text('{"labels": [["a.png", 1]], "classes": ["dark", "light"]}')
    assert labels() == labels("class=light") == [1]
    assert labels("class=dark") == [0]


def test_a_damaged_starting_image_is_reported_before_sampling(configuration, relay_overrides, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    for number in range(3):
        Image.effect_noise((8, 8), 50).convert("RGB").save(small / f"{number}.png")
    whole = (small / "2.png").read_bytes()
    (small / "2.png").write_bytes(whole[: len(whole) * 2 // 3])
    start = [*relay_overrides, f"relay.start={small}", "class=-1", "batch_size=1", f"run_dir={tmp_path / 'made'}"]
    with pytest.raises(UserError, match=r"'2\.png' in .* cannot be decoded"):
        sample(configuration("sample", *start))
    assert not (tmp_path / "made").exists()
    assert sample(configuration("sample", *start, "seeds=0-1"))["images"] == 2  # those are whole


def test_given_images_of_another_size_are_named(configuration, relay_overrides, tmp_path):
    Image.new("RGB", (12, 12)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"relay\.start: 'a.png' .* is 12x12; it must be 8x8"):
        sample(
            configuration("sample", *relay_overrides, f"relay.start={tmp_path}", "class=0", "relay.start_size=input")
        )


@pytest.mark.slow
def test_early_hand_over_is_reported(configuration, relay_overrides, evaluate, tmp_path, capsys):
    options = ["seeds=0-1", "relay.hand_over_sigma=1", "relay.stages.base.changes.sampler.steps=9"]
    results = sample(configuration("sample", *evaluate, *options))
    saved = results["saved_evaluations"]
    assert saved > 0
    assert f"network evaluations saved per image: {saved}" in capsys.readouterr().out
    assert results["settings"]["stages"]["base"]["network_evaluations"] == 2 * 9 - 1 - saved
    stored = json.loads((tmp_path / "samples/metrics.json").read_text())
    assert stored["saved_evaluations"] == saved
    assert stored["settings"]["hand_over_sigma"] == 1
    with pytest.raises(UserError, match=r"hand_over_sigma was 1, is 2"):
        sample(configuration("sample", *relay_overrides, "relay.hand_over_sigma=2", options[-1]))


@pytest.mark.slow
def test_postprocessing_is_done_before_writing_and_recorded(configuration, relay_overrides, tmp_path):
    sample(configuration("sample", *relay_overrides, "seeds=0-1"))
    changed = [
        "+relay.postprocess._target_=relay_diffusion.sampling.postprocess.Enhance",
        "+relay.postprocess.brightness=0.5",
    ]
    sample(configuration("sample", *relay_overrides, *changed, "seeds=0-1", f"run_dir={tmp_path / 'dark'}"))
    for name in pngs(tmp_path / "samples/images"):
        with (
            Image.open(tmp_path / "samples/images/00000000" / name) as before,
            Image.open(tmp_path / "dark/images/00000000" / name) as after,
        ):
            difference = np.asarray(after).astype(float) - 0.5 * np.asarray(before)
        assert np.abs(difference).max() <= 1
    assert "Enhance(contrast=1.0, brightness=0.5" in (tmp_path / "dark/settings.json").read_text()


@pytest.mark.slow
def test_existing_images_are_evaluated(configuration, small_zip, tmp_path):
    """A set has distance 0 to itself, and precision and recall 1."""
    with zipfile.ZipFile(small_zip) as archive:
        archive.extractall(tmp_path / "images", [name for name in archive.namelist() if name.endswith(".png")][:8])
    sets = [f"{name}={tmp_path / 'images'}" for name in ("images", "reference")]
    options = ["mode=evaluate", "metrics=adm", *sets, f"metrics.reference.cache={tmp_path / 'reference'}"]
    results = sample(configuration("sample", *options, "trainer.accelerator=cpu", f"run_dir={tmp_path / 'run'}"))
    assert (results["images"], results["precision"], results["recall"]) == (8, 1.0, 1.0)
    assert results["fid"] < 1e-3
    assert results["sfid"] < 1e-3
    assert results["kid"] < 0
    assert "class layer" in results["not_measured"]["inception_score"]
    assert results["evaluation"]["protocol"]["name"] == "adm"
    assert results["departures"] == []


def test_an_averaged_reference_is_reported(configuration, evaluate, tmp_path, capsys):
    with image_zip(tmp_path / "small.zip") as archive:
        for i in range(3):
            archive.add(f"{i}.png", Image.new("RGB", (4, 4), (40 * i, 90, 10)))
    results = sample(configuration("sample", *evaluate, "metrics=fid", f"images={tmp_path / 'small.zip'}"))
    assert results["image_size"] == results["evaluation"]["reference"]["resolution"] == (4, 4)
    assert results["evaluation"]["reference"]["averaging"] == (4,)
    printed = " ".join(capsys.readouterr().out.split())
    assert "warning the reference images were averaged over blocks of side 4 to the size of the samples" in printed
    assert "warning FID is unreliable with 3 generated images" in printed


def test_signal_handlers_are_restored(configuration, evaluate, monkeypatch):
    """After sampling and after evaluation: Ctrl-C then interrupts the calling program again."""
    seen = []

    def handlers():
        return [signal.getsignal(number) for number in SIGNALS]

    for kind, name in ((Relay, "predict_step"), (Evaluator, "update")):
        plain = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args, plain=plain: seen.append(handlers()) or plain(*args))
    before = handlers()
    sample(configuration("sample", *evaluate, "seeds=0-1", "metrics=fid"))
    assert handlers() == before
    assert len(seen) > 2
    assert before not in seen


def test_metrics_of_files_equal_metrics_of_the_run(configuration, evaluate, tmp_path):
    sampled = sample(configuration("sample", *evaluate, "seeds=0-7", "npz=true"))
    for path in ("images", "images.npz"):
        elsewhere = [f"images={tmp_path / 'samples' / path}", f"run_dir={tmp_path / 'measured'}"]
        measured = sample(configuration("sample", *evaluate, *elsewhere))
        assert measured["fid"] == pytest.approx(sampled["fid"], rel=1e-4)
        assert measured["sfid"] == pytest.approx(sampled["sfid"], rel=1e-4)


@pytest.mark.slow
def test_evaluation_does_not_change_finished_images(configuration, relay_overrides, evaluate, tmp_path):
    sample(configuration("sample", *relay_overrides, "seeds=0-3"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").rglob("*.png")}
    assert len(times) == 5  # with relay.png
    results = sample(configuration("sample", *evaluate, "seeds=0-3", "metrics=adm"))
    assert (results["sampled_now"], results["images"]) == (0, 4)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "samples").rglob("*.png")} == times
    assert results["departures"] == ["images are rounded nearest, where adm has floor"]


@pytest.mark.slow
def test_a_class_by_name_or_number_resumes(configuration, relay_overrides):
    for i, chosen in enumerate(["1", "light", "[1]"]):
        results = sample(configuration("sample", *relay_overrides, f"class={chosen}", f"seeds=0-{i}"))
        assert results["sampled_now"] == 1


@pytest.mark.slow
def test_classes_as_often_as_in_the_reference(configuration, relay_overrides, evaluate, tmp_path, capsys):
    with image_zip(tmp_path / "uneven.zip", ["dark", "light"]) as archive:
        for i in range(8):
            pixels = np.random.default_rng(i).integers(0, 256, (16, 16, 3)).astype(np.uint8)
            archive.add(f"{'train' if i < 4 else 'other'}/{i}.png", Image.fromarray(pixels), int(i == 1))
    options = [*evaluate, "seeds=0-7", f"reference={tmp_path / 'uneven.zip'}"]
    sample(configuration("sample", *options))
    assert "class=reference uses its frequencies" in capsys.readouterr().out
    sample(configuration("sample", *options, "class=reference", f"run_dir={tmp_path / 'as-there'}"))
    assert "class=reference" not in capsys.readouterr().out
    made = ImageDataset(tmp_path / "as-there/images", 16)
    assert sorted(made.labels) == [0] * 7 + [1]
    train = [f"relay.reference.path={tmp_path / 'uneven.zip'}", "relay.reference.subset=train", "reference=null"]
    options = [*relay_overrides, *train, "class=reference", "seeds=0-7", f"run_dir={tmp_path / 'part'}"]
    sample(configuration("sample", *options))
    assert sorted(ImageDataset(tmp_path / "part/images", 16).labels) == [0] * 6 + [1] * 2


@pytest.mark.slow
def test_classes_of_a_reference_that_has_none(configuration, relay_overrides, tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    for reference, words in ((tmp_path, "has no classes"), ("demo/emoji-64.zip", "other classes than the model")):
        with pytest.raises(UserError, match=f"class=reference: reference=.*{words}"):
            sample(configuration("sample", *relay_overrides, "class=reference", f"reference={reference}"))
    with pytest.raises(UserError, match=r"relay\.reference\.path is null"):
        sample(configuration("sample", *relay_overrides, "class=reference", "reference=null"))


def test_guidance_and_rounding_reach_the_relay(configuration, relay_overrides, monkeypatch):
    built = []
    predict = Relay.predict_step
    monkeypatch.setattr(Relay, "predict_step", lambda self, *a: built.append(self) or predict(self, *a))
    changes = ["relay.stages.base.changes.guidance_scale=2", "relay.stages.base.changes.guidance_interval=[0.1,2]"]
    sample(configuration("sample", *relay_overrides, *changes, "relay.rounding=floor", "seeds=0-1", "picture=0"))
    first = next(iter(built[0].chain().values()))
    assert (first.guidance_scale, list(first.guidance_interval)) == (2, [0.1, 2])
    assert built[0].rounding == "floor"


def test_a_stage_of_a_relay_gets_another_sampler(configuration, relay_overrides):
    """The sampler is a choice or a mapping; changes of the stored one are an error."""
    choice = ("sampler@relay.stages.relay.sampler=blurring", "relay.stages.relay.sampler.steps=8")
    mapping = "relay.stages.base.sampler={_target_: relay_diffusion.samplers.EDMSampler, steps: 3}"
    trained = ("relay.stages.base.changes.sampler.churn=40", "relay.stages.relay.changes.sampler.s_noise=0.9")
    with pytest.raises(UserError, match=r"^relay\.stages\.base: changes\.sampler={'churn': 40}: changes the stored"):
        build_relay(configuration("sample", *relay_overrides, *choice, mapping, *trained).relay)
    removed = ("relay.stages.base.changes.sampler=null", "relay.stages.relay.changes.sampler=null")
    cfg = configuration("sample", *relay_overrides, *choice, mapping, *removed)
    validate_sampling(cfg)
    relay = build_relay(cfg.relay)
    base, second = relay.samplers.values()
    assert (base.evaluations, base.churn) == (5, 0)
    assert (second.s_noise, second.sigmas[-1]) == (0.2, pytest.approx(0.008))
    assert second.corruption.block == relay.chain()["relay"].corruption.block == 2
    assert relay.describe()["stages"]["base"]["sampler"] == {
        "_target_": "relay_diffusion.samplers.EDMSampler",
        "steps": 3,
    }


def test_a_sampler_must_be_a_choice_or_a_class(configuration, relay_overrides):
    for value in ("edm", "{steps: 3}"):
        cfg = configuration("sample", *relay_overrides, f"relay.stages.base.sampler={value}")
        with pytest.raises(UserError, match=r"base\.sampler=.*: write sampler@relay\.stages\.base\.sampler=CHOICE"):
            validate_sampling(cfg)
    unknown = "relay.stages.base.sampler={_target_: relay_diffusion.samplers.EDMSampler, step: 3}"
    with pytest.raises(UserError, match=r"relay\.stages\.base: sampler\.step: unknown key; did you mean steps\?"):
        sample(configuration("sample", *relay_overrides, unknown))


def test_a_damaged_reference_is_reported_before_sampling(configuration, relay_overrides, tmp_path):
    np.savez(tmp_path / "bad.npz", mu=np.full(2048, np.nan), sigma=np.eye(2048))
    with pytest.raises(UserError, match=r"^reference=.*bad\.npz.*finite"):
        sample(configuration("sample", *relay_overrides, "mode=evaluate", f"reference={tmp_path / 'bad.npz'}"))
    assert not (tmp_path / "samples").exists()
