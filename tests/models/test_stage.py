"""Stages: training, checkpoints, sampling."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.diffusion import GaussianCorruption, LinearCorruption, LogNormal
from relay_diffusion.diffusion.generators import PerImageGenerator
from relay_diffusion.errors import UserError
from relay_diffusion.models.optimization import FitState
from relay_diffusion.models.relay import Relay
from relay_diffusion.models.stage import DiffusionStage, StageInfo
from relay_diffusion.networks import EDMPreconditioner, Graphed
from relay_diffusion.samplers import BlurringSampler, EDMSampler, MultistepSampler
from support import assert_same_weights, tiny_stage, weights_of


@pytest.mark.slow
def test_augmentation_labels_are_an_input_of_the_network(fit, monkeypatch):
    told, forward = [], EDMPreconditioner.forward

    def spy(self, x, sigma, labels=None, augment_labels=None, condition=None, text=None):
        told.append(augment_labels)
        return forward(self, x, sigma, labels, augment_labels, condition, text)

    monkeypatch.setattr(EDMPreconditioner, "forward", spy)
    stage = fit("run", 32, "augment=edm", "stage.augment.probability=0.5")
    labels = torch.cat(told)
    assert labels.shape == (32, 9)
    assert (labels == 0).any()
    assert (labels != 0).any(dim=0).all()  # each of the nine was used
    told.clear()
    stage.sample((1, 3, 16, 16), [0])
    assert set(told) == {None}  # sampling asks for images as they are
    fit("plain", 4)
    assert told[-1] is None


@pytest.mark.slow
def test_a_guide_is_a_weaker_checkpoint(fit, tmp_path):
    fit("weak", 12)
    fit("strong", 40)
    scaled = {"guidance_scale": 2.0}
    strong, weak = load_stage(tmp_path / "strong"), load_stage(tmp_path / "weak")
    guided = load_stage(tmp_path / "strong", changes=scaled, guide=tmp_path / "weak")
    x, sigma, labels = torch.randn(2, 3, 16, 16), torch.tensor([0.5, 2.0]), torch.tensor([0, 1])
    with torch.no_grad():
        expected = 2 * strong.denoiser(x, sigma, labels) - weak.denoiser(x, sigma, labels)
        assert not torch.equal(expected, strong.denoiser(x, sigma, labels))
        torch.testing.assert_close(guided.guided_denoiser()(x, sigma, labels), expected)
    assert guided.info.origin["guide"]["sha256"] == weak.info.origin["sha256"]
    assert guided.sample((1, 3, 16, 16), [0], torch.tensor([1])).isfinite().all()


@pytest.mark.slow
def test_guidance_is_disabled_outside_its_interval(fit, tmp_path):
    fit("run", 40, "stage.label_dropout=0.1")
    plain = load_stage(tmp_path / "run")
    shape, labels = (1, 3, 16, 16), torch.tensor([1])
    never = {"guidance_scale": 9.0, "guidance_interval": [1000.0, 2000.0]}
    kept = load_stage(tmp_path / "run", changes=never).sample(shape, [0], labels)
    torch.testing.assert_close(kept, plain.sample(shape, [0], labels), rtol=0, atol=0)
    always = load_stage(tmp_path / "run", changes={"guidance_scale": 9.0, "guidance_interval": [0.0, 100.0]})
    everywhere = load_stage(tmp_path / "run", changes={"guidance_scale": 9.0})
    torch.testing.assert_close(always.sample(shape, [0], labels), everywhere.sample(shape, [0], labels), rtol=0, atol=0)
    assert not torch.equal(everywhere.sample(shape, [0], labels), kept)


@pytest.mark.parametrize("interval", [[1.0], [2.0, 1.0], [-1.0, 1.0]])
def test_an_invalid_interval_is_refused(fit, tmp_path, interval):
    fit("run", 4)
    with pytest.raises(UserError, match="guidance_interval"):
        load_stage(tmp_path / "run", changes={"guidance_interval": interval})


@pytest.mark.slow
def test_guidance_is_disabled_by_scale_one_whatever_interval_is_stored(fit, tmp_path):
    trained = ("stage.label_dropout=0.1", "stage.guidance_scale=3", "stage.guidance_interval=[0.1,2]")
    fit("run", 40, *trained)
    shape, labels, run = (1, 3, 16, 16), torch.tensor([1]), tmp_path / "run"
    stored, disabled = load_stage(run), load_stage(run, changes={"guidance_scale": 1, "guidance_interval": None})
    assert (stored.guidance_scale, list(stored.guidance_interval)) == (3, [0.1, 2])
    assert disabled.guided_denoiser() is disabled._evaluator(disabled.denoiser)
    everywhere = load_stage(run, changes={"guidance_interval": [0.0, float("inf")]})
    no_interval = load_stage(run)
    no_interval.guidance_interval = None
    expected = no_interval.sample(shape, [0], labels)
    assert torch.equal(everywhere.sample(shape, [0], labels), expected)
    assert not torch.equal(stored.sample(shape, [0], labels), expected)
    assert not torch.equal(disabled.sample(shape, [0], labels), expected)
    assert Relay({"a": disabled}).describe()["stages"]["a"]["guidance_interval"] is None
    with pytest.raises(UserError, match="guidance_interval needs a guidance_scale other than 1"):
        load_stage(run, changes={"guidance_scale": 1, "guidance_interval": [0.1, 2.0]})
    with pytest.raises(UserError, match="guidance_scale=1 disables guidance: remove guide"):
        load_stage(run, changes={"guidance_scale": 1}, guide=run)


@pytest.mark.slow
def test_guidance_needs_a_stage_trained_with_label_dropout(fit, tmp_path):
    fit("run", 4)
    with pytest.raises(UserError, match=r"last\.ckpt: guidance_scale=2: .*train with stage\.label_dropout=0\.1"):
        load_stage(tmp_path / "run", changes={"guidance_scale": 2.0})
    assert load_stage(tmp_path / "run", changes={"guidance_scale": 2.0}, guide=tmp_path / "run").guidance_scale == 2
    known = {"guidance_scale": 2.0, "label_dropout": 0.1}
    assert (
        load_stage(tmp_path / "run", changes=known).guidance_scale == 2
    )  # the user states that it was trained with label dropout
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    del content["stage_config"]["label_dropout"]
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(UserError, match="label_dropout=0"):
        load_stage(tmp_path / "old.ckpt", changes={"guidance_scale": 2.0})
    assert load_stage(tmp_path / "old.ckpt", changes=known).label_dropout == 0.1
    assert load_stage(tmp_path / "old.ckpt").guidance_scale == 1


def test_guidance_without_classes_or_guide_is_refused():
    with pytest.raises(UserError, match="network is unconditional and there is no guide"):
        tiny_stage(8, num_classes=0, guidance_scale=2.0).guided_denoiser()


@pytest.mark.slow
def test_a_guide_that_does_not_fit_is_refused(fit, tmp_path):
    fit("run", 4)
    fit("other", 4, "resolution=8")
    with pytest.raises(UserError, match="guide"):
        load_stage(tmp_path / "run", guide=tmp_path / "other")


def test_accumulation_counts_images_and_steps(fit, tmp_path):
    stage = fit("run", 16, "trainer.accumulate_grad_batches=2")
    assert stage.images_seen == 16
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4


@pytest.mark.slow
def test_the_number_of_images_holds_when_the_batch_changes(fit):
    fit("run", 16)
    assert fit("run", 40, "data.batch_size=8").images_seen == 40


@pytest.mark.slow
def test_an_optimizer_without_some_options_can_leave_them_out(fit):
    sgd = ("stage.optimizer._target_=torch.optim.SGD", "~stage.optimizer.betas", "~stage.optimizer.eps")
    with pytest.raises(UserError, match=r"stage\.optimizer: .*'betas'.*~stage\.optimizer"):
        fit("run", 4, sgd[0])
    assert fit("run", 4, *sgd).images_seen == 4
    sprop = ("stage.optimizer._target_=torch.optim.Rprop", "~stage.optimizer.betas", "~stage.optimizer.eps")
    assert fit("other", 4, *sprop, "~stage.optimizer.fused").images_seen == 4
    assert fit("other", 8, *sprop, "~stage.optimizer.fused").images_seen == 8


@pytest.mark.slow
def test_a_run_without_average_can_start_one(fit, tmp_path):
    fit("run", 4, "~callbacks.ema")
    with pytest.raises(UserError, match="no ema weights: use weights=raw"):
        load_stage(tmp_path / "run")
    fit("run", 8)
    assert load_stage(tmp_path / "run").images_seen == 8


@pytest.mark.slow
def test_another_seed_changes_the_run(fit, tmp_path):
    fit("a", 8)
    fit("b", 8, "seed=1")
    a, b = (weights_of(tmp_path / f"{name}/checkpoints/last.ckpt") for name in "ab")
    assert any(not torch.equal(a[key], b[key]) for key in a)


@pytest.mark.slow
def test_warm_up_is_linear_in_images(fit):
    rates = {}
    for images in (12, 16, 24):
        stage = fit(f"run{images}", images, "stage.warmup_images=16", "stage.optimizer.lr=1e-3")
        rates[images] = stage.trainer.optimizers[0].param_groups[0]["lr"]
    # the last step of each run began 4 images earlier
    assert rates == pytest.approx({12: 1e-3 * 8 / 16, 16: 1e-3 * 12 / 16, 24: 1e-3})


def test_ema_in_the_checkpoint_is_the_formula(fit, tmp_path):
    fit("run", 12, "callbacks.checkpoints.every_n_images=4", "callbacks.checkpoints.keep=9")
    folder = tmp_path / "run/checkpoints"
    files = [*sorted(folder.glob("images-*.ckpt")), folder / "last.ckpt"]
    assert [torch.load(f, weights_only=True)["images_seen"] for f in files] == [4, 8, 12]
    average = None
    for file, seen in zip(files, (0, 4, 8), strict=True):
        content = torch.load(file, weights_only=True)
        raw = {k.removeprefix("denoiser."): v for k, v in content["state_dict"].items()}
        beta = 0.5 ** (4 / max(min(500_000, seen * 0.05), 1e-8))
        average = raw if average is None else {k: beta * average[k] + (1 - beta) * raw[k] for k in raw}
        for key, value in content["ema"]["weights"].items():
            torch.testing.assert_close(value, average[key], rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_load_stage_needs_nothing_but_the_file(fit, tmp_path):
    trained = fit("run", 24)
    for path in (tmp_path / "run", tmp_path / "run/checkpoints", tmp_path / "run/checkpoints/last.ckpt"):
        loaded = load_stage(path, weights="raw")
        assert not loaded.training
        assert_same_weights(loaded.state_dict(), trained.state_dict())
    assert loaded.info.class_names == ["dark", "light"]
    assert loaded.images_seen == 24
    averaged = load_stage(tmp_path / "run")
    assert averaged.info.origin["weights"] == "ema"
    assert any(not torch.equal(averaged.state_dict()[k], v) for k, v in trained.state_dict().items())


def test_changes_replace_stored_settings(fit, tmp_path):
    fit("run", 4, "stage.label_dropout=0.1")
    changed = load_stage(tmp_path / "run", changes={"guidance_scale": 2.0, "sampler": {"steps": 7, "churn": None}})
    assert changed.sampler.evaluations == 13
    assert changed.guidance_scale == 2.0
    with pytest.raises(UserError, match="stepz"):
        load_stage(tmp_path / "run", changes={"sampler": {"stepz": 7}})
    with pytest.raises(UserError, match="steps=0"):
        load_stage(tmp_path / "run", changes={"sampler": {"steps": 0}})
    with pytest.raises(UserError, match="use ema or raw"):
        load_stage(tmp_path / "run", weights="best")


@pytest.mark.slow
def test_a_change_of_the_corruption_is_one_of_the_samplers_too(fit, tmp_path):
    """The sampler has a copy, which can also be changed alone, as in the published settings."""
    fit("run", 4, stage="relay")
    stored = load_stage(tmp_path / "run")
    both = load_stage(tmp_path / "run", changes={"corruption": {"blur_sigma_max": 0.5}})
    assert both.corruption.blur_sigma_max == both.sampler.corruption.blur_sigma_max == 0.5
    alone = load_stage(tmp_path / "run", changes={"sampler": {"corruption": {"blur_sigma_max": 0.5}}})
    assert alone.corruption.blur_sigma_max == stored.corruption.blur_sigma_max
    assert alone.sampler.corruption.blur_sigma_max == 0.5
    apart = {"corruption": {"min_gain": 0.1, "blur_sigma_max": 0.5}, "sampler": {"corruption": {"min_gain": 0.2}}}
    changed = load_stage(tmp_path / "run", changes=apart)
    assert (changed.corruption.min_gain, changed.sampler.corruption.min_gain) == (0.1, 0.2)
    assert changed.sampler.corruption.blur_sigma_max == 0.5


@pytest.mark.slow
def test_a_checkpoint_keeps_the_corruption_with_either_sampler(fit, tmp_path):
    fit("run", 4, "stage/corruption=linear", stage="relay")
    loaded = [
        load_stage(tmp_path / "run"),
        load_stage(
            tmp_path / "run", sampler={"_target_": "relay_diffusion.samplers.MultistepSampler", "sigma_max": 0.8}
        ),
    ]
    for stage, sampler in zip(loaded, (BlurringSampler, MultistepSampler), strict=True):
        assert isinstance(stage.sampler, sampler)
        assert isinstance(stage.corruption, LinearCorruption)
        assert isinstance(stage.sampler.corruption, LinearCorruption)
        assert stage.sample((1, 3, 16, 16), [0], previous=torch.zeros(1, 3, 4, 4)).isfinite().all()


@pytest.mark.slow
def test_a_checkpoint_of_another_stage_is_not_continued(fit):
    fit("run", 4)
    with pytest.raises(UserError, match=r"different settings \(denoiser\.network\.channels was 8, is 16\)"):
        fit("run", 8, "network.channels=16")
    with pytest.raises(UserError, match="different settings"):
        fit("run", 8, stage="relay")


def test_classes_must_be_those_of_the_data(fit):
    with pytest.raises(UserError, match=r"num_classes=3.*2 classes"):
        fit("run", 4, "network.num_classes=3")


class Malicious:
    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return (Path.touch, (self.target,))


def test_hostile_and_damaged_checkpoints_are_refused(fit, tmp_path):
    fit("run", 4)
    good = tmp_path / "run/checkpoints/last.ckpt"
    trap = tmp_path / "executed"
    evil = tmp_path / "evil.ckpt"
    torch.save({"stage_config": {}, "x": Malicious(trap)}, evil)
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Malicious(trap), protocol=2))
    (tmp_path / "newer.pkl").write_bytes(pickle.dumps(Malicious(trap), protocol=4))
    (tmp_path / "text.ckpt").write_text("hello")
    (tmp_path / "truncated.ckpt").write_bytes(good.read_bytes()[:2000])
    torch.save({"weights": torch.zeros(2)}, tmp_path / "other.ckpt")
    for name in ("evil.ckpt", "plain.pkl", "newer.pkl", "text.ckpt", "truncated.ckpt", "other.ckpt", "missing.ckpt"):
        with pytest.raises(UserError, match=name):
            load_stage(tmp_path / name)
    assert not trap.exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "relay_diffusion.models.stage.torch.nn.Linear",
        "relay_diffusion.checkpoints.loading.load_stage",
        "builtins.eval",
    ],
)
def test_a_stored_config_may_only_name_classes_of_the_project(fit, tmp_path, target):
    fit("run", 4)
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    content["stage_config"]["loss"]["_target_"] = target
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt names"):
        load_stage(tmp_path / "evil.ckpt")


def test_the_same_seeds_give_the_same_images_in_any_batch():
    stage = tiny_stage(8)
    labels = torch.tensor([0, 1, 0, 1, -1])
    whole = stage.sample((5, 3, 8, 8), [3, 1, 4, 15, 9], labels)
    parts = [stage.sample((n, 3, 8, 8), s, labels[i : i + n]) for i, n, s in ((0, 2, [3, 1]), (2, 3, [4, 15, 9]))]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-4)  # 1/80 of a gray level
    assert (whole[0] - whole[1]).abs().max() > 0.1


@pytest.mark.parametrize(
    ("size", "stream"), [((8, 8), 8), ((12, 12), 12), ((8, 12), 2**31 + 12), ((12, 8), 3 * 2**30 + 8)]
)
def test_the_noise_depends_on_the_seed_and_the_size(size, stream):
    """Images of a seed stay the same in later versions: the stream of a square is its side."""
    stage = tiny_stage(8)
    drawn = []
    stage.sampler = lambda denoise, start, randn_like, labels: drawn.append(start) or start  # noqa: ARG005
    stage.sample((2, 3, *size), [3, 5])
    expected = PerImageGenerator([3, 5], stream=stream).randn_like(torch.empty(2, 3, *size))
    assert torch.equal(drawn[0], expected)


def test_training_discards_the_cuda_graphs():
    stage = tiny_stage(8)
    first = stage.eval()._evaluator(stage.denoiser)
    assert isinstance(first, Graphed)
    assert stage._evaluator(stage.denoiser) is first
    assert stage.train()._evaluator(stage.denoiser) is stage.denoiser
    assert stage.eval()._evaluator(stage.denoiser) is not first


def test_sampling_leaves_the_mode_of_the_stage():
    stage = tiny_stage(8)
    stage.train()
    stage.sample((1, 3, 8, 8), [0])
    assert stage.training


def test_labels_that_the_network_does_not_know_are_refused():
    with pytest.raises(UserError, match="the model has no classes"):
        tiny_stage(8, num_classes=0).sample((1, 3, 8, 8), [0], torch.tensor([1]))
    with pytest.raises(UserError, match=r"class 2: .* 0\.\.1"):
        tiny_stage(8).sample((1, 3, 8, 8), [0], torch.tensor([2]))


def test_metadata_of_a_stage_is_immutable(fit, tmp_path):
    trained = fit("run", 8)
    assert trained.info == StageInfo(trained.info.config, ["dark", "light"])
    loaded = load_stage(tmp_path / "run")
    assert (loaded.info.images_seen, loaded.images_seen, loaded.info.origin["images_seen"]) == (8, 8, 8)
    assert loaded.info.config == {key: value for key, value in trained.info.config.items() if key != "optimizer"}
    with pytest.raises(AttributeError):
        loaded.info.images_seen = 9


def test_a_second_fit_without_average_keeps_none(fit):
    """A callback sets the stage's average for one fit."""
    stage = fit("run", 8)
    assert stage.ema is not None
    stage.setup("predict")
    assert stage.ema is not None
    stage.setup("fit")
    assert (stage.ema, stage.fit_state) == (None, FitState())


def test_a_fit_counts_nothing_of_one_that_failed_between_micro_batches():
    stage = tiny_stage(4)
    stage.add_pending(4, torch.ones(4))
    next(stage.parameters()).grad = torch.ones_like(next(stage.parameters()))
    stage.gradient_norm.add(torch.ones(()))
    stage.setup("fit")
    assert not stage.mid_accumulation
    assert stage.gradient_norm.take() is None


def test_a_stage_that_refuses_its_settings_is_named(fit):
    with pytest.raises(UserError, match=r"^stage: network\.condition_channels=3: DiffusionStage provides 0"):
        fit("run", 4, "network.condition_channels=3")


def test_a_sampler_without_evaluations_is_refused():
    stage = tiny_stage(4)
    for sampler in ("edm", object(), lambda denoise, start, randn_like, labels=None: start):  # noqa: ARG005
        with pytest.raises(ValueError, match=r"^sampler=\w+: must be callable, with the number of network evaluations"):
            DiffusionStage(stage.denoiser, stage.corruption, stage.loss, sampler)


def test_a_corruption_without_its_interface_is_refused():
    stage, method = tiny_stage(4), lambda *_: None
    methods = {"block": 1, "start": method, "corrupt": method}
    without_level = SimpleNamespace(schedule=SimpleNamespace(draw=method), draw_noise=method, **methods)
    for corruption, message in (
        (
            SimpleNamespace(**methods),
            "corruption=SimpleNamespace: has no schedule, draw_noise; it needs schedule, block,",
        ),
        (without_level, "corruption.schedule=SimpleNamespace: has no level; it needs draw, level$"),
    ):
        with pytest.raises(ValueError, match=rf"^{message}"):
            DiffusionStage(stage.denoiser, corruption, stage.loss, stage.sampler)


class _Steps(EDMSampler):
    def __call__(self, denoise, start, randn_like):  # noqa: ARG002
        return start


class _Wide(GaussianCorruption):
    def corrupt(self, x0, sigma, noise, extra):  # noqa: ARG002
        return x0


class _Unaugmented:
    labels = 0

    def __call__(self):
        return None


class _Narrow(LogNormal):
    def draw(self, size):
        return torch.ones(size)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"sampler": _Steps()},
            r"^sampler=_Steps: __call__ must take the arguments \(denoise, start, randn_like, labels\)",
        ),
        (
            {"corruption": _Wide(LogNormal())},
            r"^corruption=_Wide: corrupt must .* \(x0, sigma, noise\): missing .*'extra'",
        ),
        (
            {"corruption": GaussianCorruption(_Narrow())},
            r"^corruption\.schedule=_Narrow: draw must .* \(size, device\): too",
        ),
        (
            {"loss": lambda denoised, x0: x0 - denoised},
            r"^loss=function: __call__ must .* \(denoised, x0, sigma\): too many",
        ),
        ({"loss": torch.nn.Identity()}, r"^loss=Identity: __call__ must .* \(denoised, x0, sigma\): too many"),
        ({"augment": _Unaugmented()}, r"^augment=_Unaugmented: __call__ must .* \(images\): too many"),
    ],
)
def test_a_method_with_other_arguments_is_refused(parts, message):
    stage = tiny_stage(4)
    given = {"denoiser": stage.denoiser, "corruption": stage.corruption, "loss": stage.loss, "sampler": stage.sampler}
    with pytest.raises(UserError, match=message):
        DiffusionStage(**given | parts)


def test_a_sampler_with_other_arguments_is_refused_in_sampling():
    stage = tiny_stage(4)
    stage.sampler = _Steps()
    with pytest.raises(UserError, match=r"^sampler=_Steps: __call__ must take the arguments"):
        stage.sample((1, 3, 4, 4), [0])


def test_a_network_with_other_arguments_is_refused():
    stage = tiny_stage(4)
    stage.denoiser.network.forward = lambda x, noise: x  # noqa: ARG005
    with pytest.raises(
        UserError, match=r"^denoiser\.network=UNet: forward must take the arguments \(x, c_noise, labels"
    ):
        DiffusionStage(stage.denoiser, stage.corruption, stage.loss, stage.sampler)
