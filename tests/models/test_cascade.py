"""Later stage of a conditioned cascade: training, loading, sampling in a relay."""

from functools import partial

import pytest
import torch
from PIL import Image

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.diffusion import ConditionedCorruption, DenoisingLoss, LogNormal
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.errors import UserError
from relay_diffusion.models.cascade import CascadeStage
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.networks import EDMPreconditioner, UNet
from relay_diffusion.samplers import EDMSampler
from relay_diffusion.sampling.run import sample
from support import tiny_stage

SHAPE = (3, 3, 8, 8)


def cascade(num_classes=2, stage=CascadeStage, condition_channels=3, **settings):
    """Build a stage 4 -> 8 of a few thousand random parameters."""
    network = UNet(
        8, channels=8, channel_mult=[1, 2], blocks=1, attention_resolutions=[], num_classes=num_classes,
        condition_channels=condition_channels,
    )  # fmt: skip
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    corruption = ConditionedCorruption(LogNormal(), block=2)
    optimizer = partial(torch.optim.Adam, lr=1e-3)
    denoiser, loss = EDMPreconditioner(network), DenoisingLoss()
    return stage(denoiser, corruption, loss, EDMSampler(steps=3), optimizer, **settings)


def test_the_same_seeds_give_the_same_images_in_any_batch():
    stage, small, labels = cascade(), torch.randn(3, 3, 4, 4), torch.tensor([0, 1, -1])
    whole = stage.sample(SHAPE, [3, 1, 4], labels, small)
    split = ((0, 1, [3]), (1, 2, [1, 4]))
    parts = [stage.sample((n, 3, 8, 8), s, labels[i : i + n], small[i : i + n]) for i, n, s in split]
    torch.testing.assert_close(whole, torch.cat(parts), rtol=0, atol=1e-4)
    assert (whole[0] - whole[1]).abs().max() > 0.1


def test_images_depend_on_the_small_ones_and_on_their_noise():
    stage, small = cascade(), torch.randn(3, 3, 4, 4)
    images = stage.sample(SHAPE, [0, 1, 2], previous=small)
    assert (stage.sample(SHAPE, [0, 1, 2], previous=-small) - images).abs().flatten(1).amax(1).min() > 1e-3
    stage.corruption.condition_noise = 0.4
    assert (stage.sample(SHAPE, [0, 1, 2], previous=small) - images).abs().flatten(1).amax(1).min() > 1e-3


def test_the_noise_in_the_small_image_is_not_that_of_the_large_one():
    stage, drawn = cascade(), []

    def randn_like(x):
        drawn.append(torch.randn_like(x))
        return drawn[-1]

    condition = stage.sampling_condition(torch.zeros(1, 3, 4, 4), randn_like)
    assert [tuple(x.shape) for x in drawn] == [(1, 3, 4, 4)]  # one draw, after that of the start
    expected = stage.corruption.condition(torch.zeros(1, 3, 4, 4), torch.tensor([0.1]), drawn[0])
    torch.testing.assert_close(condition.images, expected)
    assert condition.level.tolist() == pytest.approx([0.1])


def test_guidance_is_applied_with_the_condition():
    weaker, small, labels = cascade(), torch.randn(3, 3, 4, 4), torch.tensor([0, 1, 0])
    stage = cascade(label_dropout=0.1)
    condition = stage.sampling_condition(small, torch.randn_like)
    x, sigma = torch.randn(SHAPE), torch.tensor([0.3, 1.0, 5.0])
    with torch.no_grad():
        plain, none = (stage.guided_denoiser(condition)(x, sigma, given) for given in (labels, torch.full((3,), -1)))
        stage.guidance_scale = 3.0
        torch.testing.assert_close(stage.guided_denoiser(condition)(x, sigma, labels), none + 3 * (plain - none))
        expected = weaker.guided_denoiser(condition)(x, sigma, labels)
        stage.guide = weaker.denoiser
        torch.testing.assert_close(
            stage.guided_denoiser(condition)(x, sigma, labels), expected + 3 * (plain - expected)
        )
    with pytest.raises(UserError, match="conditioned"):
        cascade(guide=tiny_stage(8, 2))


def test_a_stage_and_its_network_agree_on_the_condition():
    with pytest.raises(ValueError, match="condition_channels=3: DiffusionStage provides 0 condition"):
        cascade(stage=DiffusionStage)
    with pytest.raises(ValueError, match="condition_channels=0: CascadeStage provides 3 condition"):
        cascade(condition_channels=0)


@pytest.mark.slow
def test_training_lowers_the_loss_and_uses_the_condition(fit, tmp_path):
    """The images are dark or light noise; at high noise levels only the small image shows which."""
    quick = ("stage.optimizer.lr=5e-3", "callbacks.grid.every_n_images=4", "network.num_classes=0", "resolution=8")
    fit("start", 4, *quick, stage="cascade")
    with Image.open(tmp_path / "start/samples/images-000000004.png") as picture:
        assert picture.width == 3 * (4 * 128 + 3 * 2) + 2 * 12  # enlarged, made, real: each image shown at 128x128
    stage = fit("run", 960, *quick, "data.batch_size=8", "callbacks.grid.every_n_images=0", stage="cascade")
    images = torch.stack([stage.trainer.datamodule.dataset[i][0] for i in range(24)])
    x0, sigma = to_float(images), torch.full((24,), 2.0)
    noisy = stage.corruption.corrupt(x0, sigma, torch.randn_like(x0))

    def loss(trained, condition):
        with torch.no_grad():
            return trained.loss(trained.denoiser(noisy, sigma, condition=condition), x0, sigma).mean().item()

    condition = stage.training_condition(x0)
    trained, other = loss(stage, condition), loss(stage, condition._replace(images=condition.images.roll(1, 0)))
    assert trained < 0.3 * loss(load_stage(tmp_path / "start", "raw"), condition)
    assert trained < 0.5 * other  # dark images with the condition of light ones


@pytest.mark.slow
def test_a_cascade_is_sampled_from_its_checkpoints(fit, configuration, tmp_path):
    fit("base", 8, "resolution=8", "stage.label_dropout=0.1")
    fit("cascade", 8, "stage.corruption.block=2", "stage.label_dropout=0.1", stage="cascade")
    options = [
        "relay=cascade", f"relay.stages.base.path={tmp_path / 'base'}", "trainer.accelerator=cpu",
        f"relay.stages.cascade.path={tmp_path / 'cascade'}", f"run_dir={tmp_path / 'samples'}",
    ]  # fmt: skip
    options.append("relay.stages.cascade.changes.guidance_scale=2")
    assert sample(configuration("sample", *options, "seeds=0-3"))["sampled_now"] == 4
    assert len(list((tmp_path / "samples/images").rglob("seed*.png"))) == 4
    with Image.open(tmp_path / "samples/relay.png") as picture:
        assert picture.width == 3 * (4 * 128 + 3 * 2) + 2 * 12  # small, enlarged, made: each image shown at 128x128
    again = [*options, "seeds=0-4"]
    with pytest.raises(UserError, match="different settings"):
        sample(configuration("sample", *again, "relay.stages.cascade.changes.corruption.condition_noise=0.3"))
    assert sample(configuration("sample", *again))["sampled_now"] == 1


def test_a_cascade_is_rebuilt_from_its_checkpoint(fit, tmp_path):
    trained = fit("run", 8, stage="cascade")
    loaded = load_stage(tmp_path / "run", "raw", {"corruption": {"condition_noise": 0.2}})
    assert type(loaded) is CascadeStage
    assert loaded.corruption.condition_noise == 0.2
    trained.corruption.condition_noise = 0.2
    with pytest.raises(UserError, match=r"condition_noise=2: must lie between 0 and condition_noise_max=0\.5"):
        load_stage(tmp_path / "run", "raw", {"corruption": {"condition_noise": 2}})
    small = torch.randn(2, 3, 4, 4)
    expected = trained.sample((2, 3, 16, 16), [0, 1], previous=small)
    assert torch.equal(loaded.sample((2, 3, 16, 16), [0, 1], previous=small), expected)


def test_a_relay_hands_small_images_to_a_cascade_and_a_cascade_to_a_relay_stage():
    first, second, third = tiny_stage(4), cascade(), tiny_stage(24, 3)
    images = Relay({"a": first, "b": second, "c": third}).sample_stages([5], torch.tensor([1]))
    alone = second.sample((1, 3, 8, 8), [5], torch.tensor([1]), images["a"].clamp(-1, 1))
    torch.testing.assert_close(images["b"], alone, rtol=0, atol=0)
    assert images["c"].shape == (1, 3, 24, 24)
    assert Relay({"b": second}).start_size == (4, 4)
