"""Recorded trajectories: steps, pictures and unchanged samples."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from recorder import Recorder
from relay_diffusion.diffusion import BlurringCorruption, TruncatedLogNormal
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.diffusion.guidance import observed
from relay_diffusion.diffusion.pixels import to_uint8
from relay_diffusion.models.relay import Relay, SampleBatch
from relay_diffusion.samplers import BlurringSampler, EDMSampler
from relay_diffusion.samplers.recording import Step, TrajectoryRecorder, shown_state
from relay_diffusion.sampling.batches import rank_order
from relay_diffusion.sampling.callbacks.trajectory_picture import TrajectoryPicture, evenly, frame, shown_size, strip
from relay_diffusion.sampling.run import sample
from support import tiny_stage, toy_denoiser

SAMPLERS = {
    "edm": EDMSampler(steps=6),
    "churn": EDMSampler(steps=6, churn=1.2, churn_min=0.05, churn_max=50),
    "sde": EDMSampler(steps=6, sde_scale=0.3).stopping_at(0.5),
    "blurring": BlurringSampler(BlurringCorruption(TruncatedLogNormal(), 2), steps=20),
}


class OneBuffer:
    """Denoiser that overwrites its previous output, as a replayed graph may."""

    def __init__(self):
        self.buffer = torch.empty(3, 3, 8, 8, dtype=torch.float64)

    def __call__(self, x, sigma, labels):
        return self.buffer.copy_(toy_denoiser(x, sigma, labels))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_recorded_sampler_makes_the_same_images_and_keeps_each_level_as_it_was_left(name):
    sampler, like = SAMPLERS[name], torch.empty(3, 3, 8, 8)

    def call(sampler, denoise):
        noise = PerImageGenerator([1, 2, 3], like.device, stream=0)
        return sampler(denoise, noise.randn_like(like), noise.randn_like, torch.tensor([0, 1, 2]))

    denoiser, recorder = Recorder(toy_denoiser), TrajectoryRecorder(count=2, size=(256, 256))
    plain = call(sampler, denoiser)
    assert torch.equal(call(sampler, observed(OneBuffer(), [recorder])), plain)
    assert sampler.evaluations == len(denoiser.states)

    left = {float(sigma[0]): k for k, sigma in enumerate(denoiser.sigmas)}  # the last evaluation at each level
    *steps, result = recorder.finish(plain)
    assert recorder.steps == []
    raised = 1.2 if name == "churn" else 1
    grid = [s * (raised if 0.05 <= s <= 50 else 1) for s in sampler.sigmas if s > 0]
    assert [step.sigma for step in steps] == pytest.approx(grid)
    for step in steps:
        asked = denoiser.states[left[step.sigma]][:2] * (0.5 / (0.25 + step.sigma**2) ** 0.5)
        assert torch.equal(step.states, to_uint8(asked))
        assert torch.equal(step.estimates, to_uint8(denoiser.estimates[left[step.sigma]][:2]))
    assert result.sigma == 0
    for pictures in result[1:]:
        assert torch.equal(pictures, to_uint8(plain[:2]))


def test_states_are_shown_with_the_spread_of_images():
    image = 0.5 * torch.randn(1, 3, 64, 64)
    for sigma in (0.5, 5.0, 80.0):
        assert shown_state(image + sigma * torch.randn_like(image), sigma).std() == pytest.approx(0.5, rel=0.05)
    assert torch.equal(shown_state(image, 0.0), image)


def test_large_pictures_are_kept_small():
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    averaged = torch.nn.functional.avg_pool2d(images[:1], 2).float()
    assert torch.equal(TrajectoryRecorder(1, size=(4, 4)).finish(images)[-1].states, to_uint8(averaged))
    wide = torch.cat([images, images], dim=-1)
    pictures = TrajectoryRecorder(1, size=(4, 8)).finish(wide)[-1].states
    assert torch.equal(pictures, to_uint8(torch.cat([averaged, averaged], dim=-1)))


def test_pictures_keep_the_shape_of_large_images():
    assert shown_size((64, 96)) == (64, 96)
    assert shown_size((512, 1024)) == (128, 256)
    assert shown_size((1024, 1)) == (256, 1)


def steps_of(count, size):
    """Steps of two images whose states are 10 k, and 10 k + 100 for the second; estimates 5 more."""
    base = torch.tensor([0, 100], dtype=torch.uint8)[:, None, None, None].expand(2, 3, size, size)
    return [Step(float(count - k), base + 10 * k, base + 10 * k + 5) for k in range(count)]


def test_the_strip_has_two_rows_an_image_and_the_first_and_last_step_of_each_stage():
    stages = [steps_of(9, 2), steps_of(3, 4)]
    picture = np.asarray(strip(stages, (4, 4), columns=5))
    assert picture.shape == (4 * 6 - 2, (5 * 6 - 2) + 12 + (3 * 6 - 2), 3)
    rows = [[pixel[0] for pixel in picture[6 * row, :28:6]] for row in range(4)]
    assert rows[0] == [0, 20, 40, 60, 80]
    assert rows[1] == [5, 25, 45, 65, 85]
    assert rows[3] == [105, 125, 145, 165, 185]
    assert [pixel[0] for pixel in picture[12, 40::6]] == [100, 110, 120]
    assert evenly(stages[0], 8)[-1] is stages[0][-1]
    assert np.asarray(frame(stages[0][1], (4, 4)))[::6, ::6, 0].tolist() == [[10, 110], [15, 115]]


def test_the_first_device_gets_the_shown_images_and_none_is_without():
    assert rank_order([3, 4, 5], 0, 1) == [3, 4, 5]
    assert rank_order([3], 0, 2) == [3, 3]
    assert rank_order(range(9), 3, 2)[::2] == [0, 1, 2, 6, 8]  # as many as without, in all
    assert rank_order(range(9), 3, 2)[1::2] == [3, 4, 5, 7]
    few = rank_order([0, 1], 2, 3)
    assert few[::3] == [0, 1]
    assert all(few[rank::3] for rank in range(3))


def test_other_devices_record_nothing_and_an_exception_ends_the_recording():
    relay = Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2)})
    for first, recording in ((False, 0), (True, 1)):
        callback = TrajectoryPicture("nowhere")
        callback.on_predict_start(SimpleNamespace(is_global_zero=first), relay)
        assert len(relay.observers) == recording
        callback.on_exception(None, relay, KeyboardInterrupt())
        assert relay.observers == []


def test_fewer_images_than_asked_for_are_drawn_once_each(tmp_path):
    """One image of a batch of two is wanted; the other is padding."""
    relay, callback = Relay({"a": tiny_stage(4)}).eval(), TrajectoryPicture(tmp_path, 3)
    trainer = SimpleNamespace(is_global_zero=True)
    callback.on_predict_start(trainer, relay)
    batch = SampleBatch(torch.tensor([0]), torch.tensor([7, 7]), torch.tensor([1, 1]), None)
    callback.on_predict_batch_end(trainer, relay, relay.predict_step(batch, 0))
    assert not list(tmp_path.iterdir())
    callback.on_predict_end(trainer, relay)
    with Image.open(tmp_path / "trajectory.png") as picture:
        assert picture.size == (4 * 6 - 2, 2 * 6 - 2)  # three steps and the result
    assert relay.observers == []


def pngs(folder):
    return {path.name: path.read_bytes() for path in Path(folder).rglob("seed*.png")}


def drawn(folder):
    return [(folder / f"trajectory.{kind}").read_bytes() for kind in ("png", "webp")]


@pytest.mark.slow
def test_the_same_images_with_and_without_and_after_an_interruption(configuration, relay_overrides, tmp_path):
    """With guidance and early hand-over; three of five images, in batches of two."""
    first = "relay.stages.base.changes"
    options = [
        *relay_overrides, f"{first}.guidance_scale=2", f"{first}.guidance_interval=[0.1,9]",
        "relay.hand_over_sigma=0.5", "batch_size=2",
    ]  # fmt: skip
    sample(configuration("sample", *options, "seeds=0-4", f"run_dir={tmp_path / 'plain'}"))
    assert not list((tmp_path / "plain").glob("trajectory*"))
    recorded, parts = tmp_path / "samples", tmp_path / "parts"
    results = sample(configuration("sample", *options, "seeds=0-4", "save_trajectory=3"))
    assert results["trajectory"].endswith("samples/trajectory.png and .webp")
    assert pngs(recorded / "images") == pngs(tmp_path / "plain/images")
    with Image.open(recorded / "trajectory.png") as picture, Image.open(recorded / "trajectory.webp") as animation:
        assert picture.height == 2 * 3 * (16 + 2) - 2
        assert animation.size == (3 * 18 - 2, 2 * 18 - 2)
        assert animation.n_frames > 4

    sample(configuration("sample", *options, "seeds=1-2", f"run_dir={parts}"))
    again = [*options, "seeds=0-4", "save_trajectory=3", f"run_dir={parts}"]
    for now in (3, 0):  # some are there, then all
        times = {path: path.stat().st_mtime_ns for path in (parts / "images").rglob("*.png")}
        assert sample(configuration("sample", *again))["sampled_now"] == now
        assert times.items() <= {path: path.stat().st_mtime_ns for path in (parts / "images").rglob("*.png")}.items()
        assert pngs(parts / "images") == pngs(recorded / "images")
        assert drawn(parts) == drawn(recorded)
        for kind in ("png", "webp"):
            (parts / f"trajectory.{kind}").unlink()


def test_true_is_four_images_or_as_many_as_there_are(configuration, relay_overrides, tmp_path):
    for seeds, shown in (("0-4", 4), ("0-1", 2)):
        folder = tmp_path / seeds
        sample(configuration("sample", *relay_overrides, f"seeds={seeds}", "save_trajectory=true", f"run_dir={folder}"))
        with Image.open(folder / "trajectory.png") as picture:
            assert picture.height == 2 * shown * 18 - 2


def test_the_way_from_given_images(configuration, relay_overrides, tmp_path):
    sample(configuration("sample", *relay_overrides, "relay.last=base", "seeds=0-1", f"run_dir={tmp_path / 'small'}"))
    start = [*relay_overrides, "relay.stages.base.path=nowhere", f"relay.start={tmp_path / 'small/images'}"]
    sample(configuration("sample", *start, "save_trajectory=1", "format=zip"))
    with Image.open(tmp_path / "samples/trajectory.png") as picture:
        pixels = np.asarray(picture)
    assert pixels.shape[0] == 2 * 18 - 2
    with Image.open(next((tmp_path / "small/images").rglob("seed00000000.png"))) as small:
        upsampled = np.asarray(small).repeat(2, 0).repeat(2, 1)
    noisy = pixels[:16, :16].astype(float) - 127.5
    assert np.corrcoef(noisy.ravel(), upsampled.ravel())[0, 1] > 0.3
