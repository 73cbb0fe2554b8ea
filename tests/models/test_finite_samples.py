"""Non-finite samples: nothing is written or evaluated, and the message names their noise level."""

import math
import re

import pytest
import torch

from relay_diffusion.diffusion.guidance import observed
from relay_diffusion.errors import UserError
from relay_diffusion.models import relay as relay_module
from relay_diffusion.models.finite_samples import NonFiniteSamplesError, finite, first_nonfinite_level
from relay_diffusion.models.relay import Relay, SampleBatch
from relay_diffusion.models.stage import DiffusionStage, StageInfo
from relay_diffusion.samplers import EDMSampler
from relay_diffusion.sampling.run import sample
from support import run, tiny_stage

REMEDY = "use another checkpoint, or precision 32-true or bf16-mixed instead of 16-mixed"


def failing(stage, below=math.inf, value=math.nan, images=slice(None)):
    """Make a stage's estimates `value` for some images at noise levels up to `below`."""
    guided = stage.guided_denoiser

    def denoise(x, sigma, labels, inner):
        estimates = inner(x, sigma, labels)
        if sigma[0] <= below:
            estimates = estimates.clone()
            estimates[images] = value
        return estimates

    stage.guided_denoiser = lambda *conditions: lambda *given: denoise(*given, guided(*conditions))
    return stage


def batch(seeds, positions=None):
    wanted = list(range(len(seeds))) if positions is None else positions
    return SampleBatch(torch.tensor(wanted), torch.tensor(seeds), torch.full((len(seeds),), -1), None)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_the_first_stage_that_fails_is_named_with_seeds_and_sigma(value):
    """The next stage gets clamped images, in which an infinity becomes white."""
    relay = Relay({"a": failing(tiny_stage(4), 1.0, value, slice(1, 2)), "b": tiny_stage(8, 2)})
    sigma = f"{relay.samplers['a'].sigmas[2]:.4g}"  # the first level below 1
    message = f"relay.stages.a: the samples of seed 9 are not finite, first the network's estimate at sigma={sigma}: "
    for attempt in (lambda: relay.sample([4, 9]), lambda: relay.predict_step(batch([4, 9]), 0)):
        with pytest.raises(NonFiniteSamplesError, match=re.escape(message + REMEDY)):
            attempt()


def test_a_later_stage_that_fails_is_named():
    relay = Relay({"a": tiny_stage(4), "b": failing(tiny_stage(8, 2))})
    with pytest.raises(
        UserError, match=r"^relay\.stages\.b: the samples of seeds 0, 1, 2, 3 and 1 more are not finite"
    ):
        relay.sample(range(5))


def test_a_stage_alone_names_its_checkpoint():
    stage = failing(tiny_stage(4))
    with pytest.raises(UserError, match=r"^this stage: the samples of seed 3 are not finite, .* at sigma=80: "):
        stage.sample((1, 3, 4, 4), [3])
    stage = failing(tiny_stage(4, info=StageInfo(origin={"file": "runs/last.ckpt"})))
    with pytest.raises(UserError, match=r"^runs/last\.ckpt: the samples of seed 3 "):
        stage.sample((1, 3, 4, 4), 3)


def test_repeated_images_that_fill_a_batch_are_named_once():
    relay = Relay({"a": failing(tiny_stage(4))})
    with pytest.raises(UserError, match="samples of seeds 7, 8 are not finite"):
        relay.predict_step(batch([7, 8, 8, 8], [0, 1]), 0)


def test_a_sampler_that_fails_with_finite_estimates_is_blamed():
    relay = Relay({"a": tiny_stage(4)})
    sampler = lambda denoise, start, randn_like, labels=None: start * math.nan  # noqa: ARG005, E731
    message = "not finite, although all estimates of the network are: use other options of the sampler"
    with relay.changed({"a": sampler}), pytest.raises(NonFiniteSamplesError, match=message):
        relay.sample([1])


def test_failures_that_do_not_repeat_are_reported_as_such(monkeypatch):
    relay = Relay({"a": tiny_stage(4)})
    monkeypatch.setattr(relay_module, "finite", lambda images: torch.zeros(len(images), dtype=torch.bool))
    with pytest.raises(UserError, match="not finite, but not when sampled once more: "):
        relay.sample([1])


def test_finite_detects_every_nonfinite_value():
    images = torch.zeros(5, 3, 2, 2)
    images[1, 2, 1, 1], images[2, 0, 0, 0], images[3, 1, 0, 1] = math.nan, math.inf, -math.inf
    images[4] = torch.finfo(torch.float32).max  # whose sum is infinite
    assert finite(images).tolist() == [True, False, False, False, True]
    assert finite(images.half()[:4]).tolist() == [True, False, False, False]


def test_the_first_level_that_fails_is_described():
    def denoise(x, sigma, labels):  # noqa: ARG001
        return x * (math.inf if sigma[0] < 10 else 0.0)

    def found(start, value=denoise):
        sampler = EDMSampler(steps=8)
        return first_nonfinite_level(lambda observers: sampler(observed(value, observers), start, torch.randn_like))

    expected = next(sigma for sigma in EDMSampler(steps=8).sigmas if sigma < 10)
    assert found(torch.randn(2, 3, 4, 4)) == f"first the network's estimate at sigma={expected:.4g}"
    assert found(torch.full((1, 3, 4, 4), math.nan)) == "first the noisy image at sigma=80"
    assert found(torch.randn(2, 3, 4, 4), lambda x, *_: x * 0.0) is None


def test_finite_samples_cost_one_reduction_a_stage_and_no_second_sampling(monkeypatch):
    relay = Relay({"a": tiny_stage(4), "b": tiny_stage(8, 2)})
    checked, evaluated = [], []
    monkeypatch.setattr(relay_module, "finite", lambda images: checked.append(images) or finite(images))
    forward = type(relay.stages[0].denoiser).forward
    monkeypatch.setattr(
        type(relay.stages[0].denoiser), "forward", lambda *given: evaluated.append(1) or forward(*given)
    )
    samples = relay.predict_step(batch([0, 1]), 0)
    assert [len(images) for images in checked] == [2, 2]
    assert len(evaluated) == sum(sampler.evaluations for sampler in relay.samplers.values())
    assert samples.images.device.type == "cpu"


@pytest.fixture
def broken(relay_runs, tmp_path):
    """Return the override of a first stage with finite weights and non-finite samples."""
    content = torch.load(relay_runs / "base/checkpoints/last.ckpt", weights_only=True)
    content["ema"]["weights"]["network.conv_out.weight"].fill_(1e38)
    torch.save(content, tmp_path / "broken.ckpt")
    return f"relay.stages.base.path={tmp_path / 'broken.ckpt'}"


@pytest.mark.slow
def test_nothing_is_written_or_measured(relay_overrides, broken, tmp_path):
    options = [*relay_overrides, broken, "mode=evaluate", "seeds=0-3", "save_trajectory=2"]
    result = run("sample.py", *options)
    assert result.returncode == 2
    *_, last = result.stderr.splitlines()
    assert "Traceback" not in result.stderr
    assert last.startswith(
        "error: relay.stages.base: the samples of seeds 0, 1, 2, 3 are not finite, first the network's"
    )
    assert last.endswith(f"at sigma=80: {REMEDY}")
    left = [path.name for path in (tmp_path / "samples").rglob("*") if path.is_file()]
    assert not [name for name in left if name.endswith((".png", ".webp")) or name == "metrics.json"]


@pytest.mark.slow
def test_batches_before_the_one_that_fails_are_kept(configuration, relay_overrides, tmp_path, monkeypatch):
    draw = DiffusionStage.draw

    def poisoned(stage, seeds, *given, **options):
        images = draw(stage, seeds, *given, **options)
        return images.masked_fill(torch.tensor([seed == 3 for seed in seeds])[:, None, None, None], math.nan)

    monkeypatch.setattr(DiffusionStage, "draw", poisoned)
    options = [*relay_overrides, "seeds=0-5", "batch_size=2"]
    with pytest.raises(NonFiniteSamplesError, match=r"relay\.stages\.base: the samples of seed 3 are"):
        sample(configuration("sample", *options))
    written = sorted(path.name for path in (tmp_path / "samples/images").rglob("*.png"))
    assert written == ["seed00000000.png", "seed00000001.png"]
    monkeypatch.undo()
    assert sample(configuration("sample", *options))["sampled_now"] == 4  # continued with a checkpoint that works


@pytest.mark.slow
def test_training_goes_on_without_a_picture(fit, tmp_path, monkeypatch, capsys):
    draw = DiffusionStage.draw
    monkeypatch.setattr(DiffusionStage, "draw", lambda *given, **options: draw(*given, **options) * math.nan)
    stage = fit("run", 8, "callbacks.grid.every_n_images=4")
    assert stage.images_seen == 8
    assert not list((tmp_path / "run/samples").glob("*"))
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert [line.partition(", ")[0] for line in warnings] == [
        "warning: no images-000000004.png", "warning: no images-000000008.png",
    ]  # fmt: skip
    assert "this stage: the samples of seeds 0, 1, 2, 3 and 12 more are not finite" in warnings[0]
    monkeypatch.undo()
    fit("run", 12, "callbacks.grid.every_n_images=4")
    assert [path.name for path in (tmp_path / "run/samples").glob("*")] == ["images-000000012.png"]
