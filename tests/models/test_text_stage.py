"""Text as a condition of stages and relays: training, guidance, sampling."""

from types import SimpleNamespace

import pytest
import torch

from relay_diffusion.checkpoints.export import export_stage
from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.data import datamodule
from relay_diffusion.diffusion import ConditionedCorruption, LogNormal
from relay_diffusion.diffusion.pixels import to_float
from relay_diffusion.diffusion.text_states import TextStates, no_text
from relay_diffusion.errors import UserError
from relay_diffusion.models.cascade import CascadeStage
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import StageInfo
from relay_diffusion.networks import EDMPreconditioner, UNet
from relay_diffusion.networks.flops import forward_flops
from relay_diffusion.samplers import EDMSampler
from support import tiny_stage
from text_rows import random_text

SHAPE = (3, 3, 8, 8)
GENERATOR = torch.Generator().manual_seed(0)
TEXT = random_text([2, 5, 1], generator=GENERATOR)
CLASSES = torch.tensor([0, 1, -1])


def stage(context_dim=6, resolution=8, block=1, num_classes=2, **settings):
    return tiny_stage(resolution, block, num_classes, context_dim=context_dim, **settings)


def cascade(context_dim=6, **settings):
    network = UNet(
        8, channels=8, channel_mult=[1, 2], blocks=1, attention_resolutions=[], num_classes=2, condition_channels=3,
        context_dim=context_dim,
    )  # fmt: skip
    for parameter in network.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    plain = tiny_stage(8)
    corruption = ConditionedCorruption(LogNormal(), block=2)
    return CascadeStage(EDMPreconditioner(network), corruption, plain.loss, EDMSampler(steps=3), **settings)


def assert_differ(a, b, least=1e-3):
    assert (a - b).abs().flatten(1).amax(1).min() > least


# ---- training ----


def step(trained, batch, seed=0):
    trained.trainer = SimpleNamespace(world_size=1, global_rank=0)
    trained.seed, trained.images_seen = seed, 0
    trained.setup("fit")
    trained.train()
    return trained.training_step(batch, 0)["per_image"]


def training_batch(count=3, text=TEXT):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return (images, torch.arange(count) % 2) if text is None else (images, torch.arange(count) % 2, text)


@pytest.mark.parametrize("build", [stage, cascade])
def test_the_loss_depends_on_the_text(build):
    trained = build()
    losses = step(trained, training_batch())
    other = step(trained, training_batch(text=TEXT.select([0, 2, 1])))
    assert torch.equal(other[0], losses[0])
    assert (other != losses).tolist() == [False, True, True]


def test_label_dropout_drops_class_and_text_of_the_same_images():
    trained, seen = stage(label_dropout=0.5), []
    trained.denoiser.network.register_forward_pre_hook(lambda _, given: seen.append((given[2], given[5])))
    step(trained, training_batch(64, random_text([3] * 64)))
    labels, text = seen[0]
    assert 8 < (labels < 0).sum() < 56
    assert torch.equal(labels < 0, ~text.mask.any(1))
    assert torch.equal(labels < 0, ~text.pooled.any(1))
    plain, without = tiny_stage(8, label_dropout=0.5), []
    plain.denoiser.network.register_forward_pre_hook(lambda _, given: without.append((given[2], given[5])))
    step(plain, training_batch(64, None))
    assert torch.equal(without[0][0], labels)  # text draws no other random numbers
    assert without[0][1] is None


def test_a_stage_without_text_ignores_the_text_of_a_batch():
    trained = tiny_stage(8, label_dropout=0.5)
    assert torch.equal(step(trained, training_batch()), step(trained, training_batch(text=None)))


def test_a_stage_with_text_needs_text_in_training():
    with pytest.raises(UserError, match=r"network\.context_dim=6: the training data has no text"):
        step(stage(), training_batch(text=None))


@pytest.fixture
def captioned(monkeypatch):
    """Text of the class in all training batches."""
    prompts, batch_of = random_text([2, 5]), datamodule.batch_of

    def with_text(dataset, indices):
        images, labels = batch_of(dataset, indices)
        return images, labels, prompts.select(labels)

    monkeypatch.setattr(datamodule, "batch_of", with_text)
    return prompts


def test_a_trained_text_stage_is_rebuilt_and_exported(fit, captioned, tmp_path):
    trained = fit("run", 16, "network.context_dim=6", "callbacks.log.every_n_images=8", "stage.label_dropout=0.1")
    shape, given = (2, 3, 16, 16), {"text": captioned}
    loaded = load_stage(tmp_path / "run", "raw", {"guidance_scale": 2.0})
    assert loaded.text_dim == trained.text_dim == 6
    trained.guidance_scale = 2.0
    expected = trained.eval().sample(shape, [0, 1], **given)
    assert torch.equal(loaded.sample(shape, [0, 1], **given), expected)
    export_stage(loaded.info.config, loaded.denoiser.state_dict(), tmp_path / "export", kind="raw")
    assert torch.equal(load_stage(tmp_path / "export", "raw").sample(shape, [0, 1], **given), expected)
    assert fit("run", 32, "network.context_dim=6", "stage.label_dropout=0.1").images_seen == 32  # resumes


def test_a_guide_has_the_same_text_encoder():
    one, other = ({"encoder": {}, "hash": name} for name in ("one", "other"))
    for text in (one, None):  # a stage of Python code names none
        stage(info=StageInfo(text=one), guide=stage(info=StageInfo(text=text)))
    weaker = stage(info=StageInfo(text=other, origin={"file": "weaker.ckpt"}))
    with pytest.raises(
        UserError, match=r"^the guide weaker\.ckpt was trained with another text encoder than the stage"
    ):
        stage(info=StageInfo(text=one), guide=weaker)


@pytest.mark.slow
def test_training_learns_what_the_text_says(fit, captioned):
    """The images are dark or light; at high noise levels only the text tells which."""
    quick = (
        "stage.optimizer.lr=3e-3",
        "network.num_classes=0",
        "network.context_dim=6",
        "data.batch_size=8",
        "resolution=8",
    )
    noisier = ("stage.corruption.schedule.p_mean=2", "stage.corruption.schedule.p_std=0.5")
    trained = fit("run", 480, *quick, *noisier, "stage.label_dropout=0.1").eval()
    images, labels = datamodule.batch_of(trained.trainer.datamodule.dataset, list(range(24)))[:2]
    x0, sigma = to_float(images), torch.full((24,), 15.0)
    noisy = x0 + 15 * torch.randn_like(x0)

    def loss(text):
        with torch.no_grad():
            return trained.loss(trained.denoiser(noisy, sigma, text=text), x0, sigma).mean().item()

    right, none, wrong = loss(captioned.select(labels)), loss(None), loss(captioned.select(1 - labels))
    assert right < 0.8 * none
    assert none < wrong


def test_images_without_classes_keep_label_dropout_for_their_text(fit, captioned):  # noqa: ARG001
    inferred = ("data.dataset.labels=false", "network.num_classes=null", "network.context_dim=6")
    trained = fit("run", 4, *inferred, "stage.label_dropout=0.1", "stage.guidance_scale=2")
    assert (trained.num_classes, trained.label_dropout, trained.guidance_scale) == (0, 0.1, 2)


@pytest.mark.slow
def test_logged_operations_include_the_tokens(fit, captioned, tmp_path):  # noqa: ARG001
    trained = fit("run", 8, "network.context_dim=6", "callbacks.log.every_n_images=8")
    header, row = ((tmp_path / "run/log/metrics.csv").read_text().splitlines())[:2]
    logged = dict(zip(header.split(","), row.split(","), strict=True))
    ratio = float(logged["train/tflops"]) / float(logged["train/images_per_second"])
    assert ratio == pytest.approx(3 * forward_flops(trained.denoiser.network, tokens=5) / 1e12)


def test_an_earlier_run_without_the_option_resumes_without_text(fit, captioned, tmp_path):  # noqa: ARG001
    fit("run", 4)
    last = tmp_path / "run/checkpoints/last.ckpt"
    content = torch.load(last, weights_only=True)
    del content["stage_config"]["denoiser"]["network"]["context_dim"]
    torch.save(content, last)
    with pytest.raises(UserError, match="context_dim"):
        fit("run", 8, "network.context_dim=6")
    assert fit("run", 8).images_seen == 8


# ---- sampling ----


@pytest.mark.parametrize("build", [stage, cascade])
def test_text_changes_the_samples(build):
    sampled = build()
    given = {"previous": torch.randn(3, 3, 4, 4)} if build is cascade else {}
    images = sampled.sample(SHAPE, [0, 1, 2], text=TEXT, **given)
    assert_differ(images, sampled.sample(SHAPE, [0, 1, 2], **given))
    assert_differ(images, sampled.sample(SHAPE, [0, 1, 2], text=TEXT.select([1, 2, 0]), **given))
    assert_differ(images[:2], sampled.sample(SHAPE, [0, 1, 2], CLASSES, text=TEXT, **given)[:2])
    none = sampled.sample(SHAPE, [0, 1, 2], text=no_text(1, 6), **given)
    torch.testing.assert_close(none, sampled.sample(SHAPE, [0, 1, 2], **given), rtol=0, atol=1e-4)


@pytest.mark.parametrize("build", [stage, cascade])
@pytest.mark.parametrize("settings", [{}, {"guidance_scale": 3.0, "label_dropout": 0.1}])
def test_the_same_seeds_give_the_same_images_in_any_batch(build, settings):
    sampled, small = build(**settings), torch.randn(3, 3, 4, 4)
    given = {"previous": small} if build is cascade else {}
    whole = sampled.sample(SHAPE, [3, 1, 4], CLASSES, text=TEXT, **given)
    parts = []
    for rows in ([0], [1, 2]):
        part = {"previous": small[rows]} if build is cascade else {}
        seeds = [[3, 1, 4][row] for row in rows]
        parts.append(sampled.sample((len(rows), 3, 8, 8), seeds, CLASSES[rows], text=TEXT.select(rows).pad(7), **part))
    torch.testing.assert_close(whole, torch.cat(parts), rtol=1e-4, atol=2e-4)  # guidance magnifies rounding


def test_one_row_serves_all_images():
    sampled, one = stage(), TEXT.select([1])
    images = sampled.sample(SHAPE, [0, 1, 2], text=one)
    assert torch.equal(images, sampled.sample(SHAPE, [0, 1, 2], text=one.select([0, 0, 0])))


class OneStep:
    """Sampler that returns the estimate at one noise level for given images."""

    evaluations = 1

    def __init__(self, x, sigma):
        self.x, self.sigma = x, sigma

    def __call__(self, denoise, start, randn_like, labels):  # noqa: ARG002
        return denoise(self.x, self.sigma, labels)


X, SIGMA = torch.randn(SHAPE, generator=GENERATOR), torch.tensor([0.3, 1.0, 5.0])


@pytest.mark.parametrize("classes", [None, CLASSES])
@pytest.mark.parametrize("has_negative", [False, True])
def test_guidance_with_text_equals_its_formula(classes, has_negative):
    negative = random_text([3], tokens=3) if has_negative else None
    sampled = stage(guidance_scale=3.0, label_dropout=0.1)
    sampled.sampler = OneStep(X, SIGMA)
    images = sampled.sample(SHAPE, [0, 1, 2], classes, text=TEXT, negative=negative)
    rows = None if negative is None else negative.select([0, 0, 0])
    sampled.eval()
    with torch.no_grad():
        conditional = sampled.denoiser(X, SIGMA, classes, text=TEXT)
        unconditional = sampled.denoiser(X, SIGMA, None, text=rows)
    torch.testing.assert_close(images, unconditional + 3 * (conditional - unconditional), rtol=0, atol=1e-4)
    assert_differ(images, conditional)


def test_the_guide_of_autoguidance_gets_the_text():
    guide = stage()
    sampled = stage(guidance_scale=2.0, guide=guide, num_classes=2)
    sampled.sampler = OneStep(X, SIGMA)
    images = sampled.sample(SHAPE, [0, 1, 2], CLASSES, text=TEXT)
    with torch.no_grad():
        strong, weak = (part.eval()(X, SIGMA, CLASSES, text=TEXT) for part in (sampled.denoiser, guide.denoiser))
    torch.testing.assert_close(images, 2 * strong - weak, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="channels of text"):
        stage(guide=stage(0), guidance_scale=2.0)


def test_an_interval_limits_guidance_with_text():
    settings = {"guidance_scale": 3.0, "label_dropout": 0.1}
    sampled, plain = stage(guidance_interval=[0.5, 2.0], **settings), stage()
    sampled.sampler = plain.sampler = OneStep(X, SIGMA)
    plain.denoiser.load_state_dict(sampled.denoiser.state_dict())
    limited, without = (part.sample(SHAPE, [0, 1, 2], text=TEXT) for part in (sampled, plain))
    torch.testing.assert_close(limited[[0, 2]], without[[0, 2]], rtol=0, atol=1e-5)
    assert_differ(limited[1:2], without[1:2])


def test_text_is_guided_in_tiles():
    """Tiles of several images at once equal those of one image, one by one."""
    enlarging = stage(resolution=16, block=2, guidance_scale=2.0, label_dropout=0.1)
    relay, single = (Relay({"a": enlarging}, tile=8, tile_batch=batch) for batch in (4, 1))
    small = torch.rand(2, 3, 12, 12) * 2 - 1
    text, classes = TEXT.select([0, 1]), torch.tensor([0, 1])
    images = relay.sample([0, 1], classes, small, text=text)
    assert images.shape == (2, 3, 24, 24)
    apart = [
        single.sample([k], classes[k : k + 1], small[k : k + 1], text=text.select([k]), negative=no_text(1, 6))
        for k in range(2)
    ]
    torch.testing.assert_close(images, torch.cat(apart), rtol=1e-4, atol=2e-4)
    assert_differ(images, relay.sample([0, 1], classes, small, text=text.select([1, 0])))


def test_text_that_a_stage_does_not_take_is_refused():
    sampled = stage()
    for text, error, message in (
        ("a cat", ValueError, "^text is str: must be TextStates"),
        (random_text([1, 2]), ValueError, "^text has 2 rows: must have 3"),
        (random_text([1, 2, 3], dim=4), UserError, "^text has token states of 4 channels, the model takes 6"),
    ):
        with pytest.raises(error, match=message):
            sampled.sample(SHAPE, [0, 1, 2], text=text)
    with pytest.raises(UserError, match=r"^text was given, but the model was trained without text: remove it"):
        stage(0).sample(SHAPE, [0, 1, 2], text=TEXT)
    with pytest.raises(UserError, match=r"^negative: needs classifier-free guidance"):
        sampled.sample(SHAPE, [0, 1, 2], text=TEXT, negative=TEXT.select([0]))
    with pytest.raises(ValueError, match=r"^negative has 3 rows: must have 1"):
        sampled.sample(SHAPE, [0, 1, 2], text=TEXT, negative=TEXT)


def test_guidance_needs_a_text_stage_trained_with_dropout():
    with pytest.raises(UserError, match=r"train with stage\.label_dropout=0\.1"):
        stage(num_classes=0, guidance_scale=2.0).guided_denoiser()
    sampled = stage(num_classes=0, guidance_scale=2.0, label_dropout=0.1)
    assert sampled.sample(SHAPE, [0, 1, 2], text=TEXT).isfinite().all()
    with pytest.raises(ValueError, match="labels=None: guidance needs class labels or text"):
        sampled.sample(SHAPE, [0, 1, 2])


# ---- relays ----


def test_text_reaches_the_stages_that_take_it():
    stages = {"a": stage(resolution=4), "b": stage(0, 8, 2), "c": stage(resolution=24, block=3)}
    relay = Relay(stages)
    assert (relay.text_dim, [part.text_dim for part in stages.values()]) == (6, [6, 0, 6])
    images, other = (relay.sample_stages([5, 6], text=TEXT.select(rows)) for rows in ([0, 1], [2]))
    previous = None
    for name, shape in (("a", (2, 3, 4, 4)), ("b", (2, 3, 8, 8)), ("c", (2, 3, 24, 24))):
        text = TEXT.select([0, 1]) if name != "b" else None
        alone = stages[name].sample(shape, [5, 6], previous=previous, text=text)
        assert torch.equal(images[name], alone)
        assert_differ(images[name], other[name])
        previous = images[name].clamp(-1, 1)


def test_a_relay_without_text_refuses_it():
    relay = Relay({"a": stage(0, 4)})
    assert relay.text_dim == 0
    for given in ({"text": TEXT}, {"negative": TEXT}):
        with pytest.raises(UserError, match="was given, but the model was trained without text: remove it"):
            relay.sample([0, 1, 2], **given)


def test_a_negative_prompt_needs_a_text_stage_with_guidance():
    guided = {"guidance_scale": 2.0, "label_dropout": 0.1}
    relay = Relay({"a": stage(resolution=4), "b": stage(0, 8, 2, **guided)})
    with pytest.raises(UserError, match=r"^negative: needs classifier-free guidance"):
        relay.sample([0], [1], text=TEXT.select([0]), negative=TEXT.select([1]))
    relay = Relay({"a": stage(resolution=4, **guided), "b": stage(resolution=8, block=2)})
    plain, negative = (relay.sample([0], text=TEXT.select([0]), negative=n) for n in (None, TEXT.select([1])))
    assert_differ(plain, negative)


def test_stages_of_other_text_encoders_are_refused():
    with pytest.raises(UserError, match=r"^relay\.stages\.c takes text of 4 channels, a of 6: "):
        Relay({"a": stage(resolution=4), "b": stage(0, 8, 2), "c": stage(4, 24, 3)})


def test_nonfinite_samples_are_drawn_again_with_their_text():
    sampled = stage()
    given = []

    def broken(x, sigma, labels, augment_labels=None, condition=None, text=None):  # noqa: ARG001
        given.append(text)
        return torch.full_like(x, torch.nan)

    sampled.denoiser.forward = broken
    with pytest.raises(UserError, match="the network's estimate at sigma=80"):
        sampled.sample((1, 3, 8, 8), [0], text=TEXT.select([1]))
    assert {isinstance(text, TextStates) and int(text.mask.sum()) for text in given} == {5}
