"""Random values of options are accepted and built, or reported."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from relay_diffusion.cli.errors import caused_by_user, explain
from relay_diffusion.config.run_dir import register_resolvers
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError
from support import PROJECT, TINY

HUGE_DIGITS = 10**5000  # Python refuses to write it
CONSTANTS = [
    None, True, False, 0, 1, -1, 2, 3, 2.5, -0.5, 1e30, 1e308, -1e308, math.nan, math.inf, -math.inf, 2**31, 2**63,
    10**12, 10**30, HUGE_DIGITS, "", " ", "abc", "1", "-1", "auto", "???", "${", "${nowhere}", "${resolution}", "a\nb",
    "\0", "\ud800", "x" * 300, "/dev/null", "/dev/null/x", "..", "~nobody-of-this-name", "os.system", [], [1], [0, 1],
    [1, "a"], [[1]], [None], [math.nan], [-1, 2**40], {}, {"a": 1}, {"_target_": "os.system"}, {"_target_": 3},
    [1] * 50,
]  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(CONSTANTS),
    st.integers(),
    st.floats(),
    st.text(max_size=10),
    st.lists(st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none()), max_size=3),
)


def _compose(name: str, *overrides: str) -> DictConfig:
    register_resolvers()
    with initialize_config_dir(str(PROJECT / "conf"), version_base="1.3"):
        return compose(name, overrides=[*overrides, "run_dir=unused/run"])


def _keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """List all options and groups of options."""
    for name in map(str, node):
        yield f"{prefix}{name}"
        if not OmegaConf.is_interpolation(node, name) and OmegaConf.is_dict(node[name]):
            yield from _keys(node[name], f"{prefix}{name}.")


DATA = "data.dataset.path=demo/emoji-64.zip"
TRAIN = _compose("train", *TINY, "stage=relay", "augment=edm", "resolution=16", DATA, "data.batch_size=4")
SAMPLE = _compose(
    "sample", "relay=quickstart", "mode=evaluate", *(f"relay.stages.{name}.path=conf" for name in ("base", "relay"))
)
TRAIN_KEYS, SAMPLE_KEYS = list(_keys(TRAIN)), list(_keys(SAMPLE))
BOUNDED = settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def _changed(cfg: DictConfig, key: str, value: Any) -> DictConfig:
    changed = copy.deepcopy(cfg)
    OmegaConf.set_struct(changed, False)
    OmegaConf.update(changed, key, value, merge=False)
    return changed


def _unresolved(value: Any) -> str:
    """Return the end of the message for an interpolation of a missing key."""
    return f"{str(value).strip('${}')}' not found"


def _accepted(cfg: DictConfig, key: str, value: Any, validate: Any) -> DictConfig | None:
    """Return the changed config; None for an error naming the key."""
    try:
        changed = _changed(cfg, key, value)
    except Exception:  # OmegaConf itself refuses the value, as it does on a command line
        return None
    try:
        validate(changed)
    except UserError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) < 600
        # what is said of an option may be said of what it is copied to, or of what does not go with it
        assert key in message or key.rpartition(".")[2] in message or _unresolved(value) in message, (key, message)
        return None
    return changed


@pytest.fixture(autouse=True)
def _in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)  # relative paths


def test_the_unchanged_configurations_are_accepted() -> None:
    validate_training(copy.deepcopy(TRAIN))
    validate_sampling(copy.deepcopy(SAMPLE))


@pytest.mark.slow
@pytest.mark.parametrize(("cfg", "validate"), [(TRAIN, validate_training), (SAMPLE, validate_sampling)])
def test_every_option_with_odd_constants(cfg: DictConfig, validate: Any) -> None:
    refused = 0
    for index, key in enumerate(list(_keys(cfg))):
        for value in CONSTANTS[index % 32 :: 32]:
            refused += _accepted(cfg, key, value, validate) is None
    assert refused > 50


@pytest.mark.slow
@settings(BOUNDED, max_examples=50)
@given(key=st.sampled_from(SAMPLE_KEYS), value=VALUES)
def test_sampling_options(key: str, value: Any) -> None:
    _accepted(SAMPLE, key, value, validate_sampling)


def _built(cfg: DictConfig, key: str) -> None:
    """Build a part of a config. User errors must have one line; others are raised."""
    node = OmegaConf.select(cfg, key)
    try:
        with torch.device("meta"):
            instantiate(node, _convert_="all")
    except Exception as error:
        if not caused_by_user(error):
            raise
        line = explain(error, PROJECT / "conf/train.yaml")
        assert line
        assert "\n" not in line


PARTS = {"data": "data", "network": "stage", "stage": "stage", "callbacks": "callbacks", "resolution": "stage"}


@pytest.mark.slow
@settings(BOUNDED, max_examples=80)
@given(key=st.sampled_from(TRAIN_KEYS), value=VALUES)
def test_what_is_accepted_is_built_or_explained(key: str, value: Any) -> None:
    """The others are refused in one line that names the option."""
    changed, part = _accepted(TRAIN, key, value, validate_training), PARTS.get(key.partition(".")[0])
    if changed is not None and part is not None:
        _built(changed, part)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage.sampler.steps", 10**12),
        ("stage.sampler.steps", 2.5),
        ("stage.sampler.rho", math.nan),
        ("stage.sampler.sigma_max", math.inf),
        ("stage.sampler.truncation_sigma", "abc"),
        ("stage.sampler.s_noise", math.nan),
        ("stage.corruption.blur_sigma_max", math.nan),
        ("stage.corruption.min_gain", None),
        ("stage.corruption.block_strength", math.inf),
        ("stage.augment.probability", "abc"),
        ("stage.guidance_interval", [1, "a"]),
        ("stage.guidance_interval", "ab"),
        ("stage.corruption.schedule.p_std", -1),
        ("stage.corruption.schedule.p_mean", math.nan),
        ("stage.corruption.schedule.sigma_floor", 0),
        ("stage.corruption.schedule.prob_length", 0),
        ("stage.denoiser.sigma_data", 0),
        ("stage.loss.max_weight", -1),
        ("stage.guidance_scale", math.inf),
        ("stage.label_dropout", 1.5),
        ("stage.warmup_images", -1),
        ("stage.seed", -1),
        ("network.dropout", 1.5),
        ("network.num_classes", -1),
        ("network.channels_last", "yes"),
        ("callbacks.ema.half_life_images", -1),
        ("callbacks.ema.ramp_up", -0.1),
        ("callbacks.log.bins", 0),
        ("callbacks.log.every_n_images", -1),
        ("callbacks.checkpoints.keep", -1),
        ("callbacks.checkpoints.best_mode", "least"),
        ("callbacks.grid.count", 0),
        ("trainer.max_nonfinite_steps", 0),
    ],
)
def test_a_range_of_a_constructor_is_reported_with_the_full_key(key: str, value: Any) -> None:
    changed = _changed(TRAIN, key, value)
    if key == "stage.guidance_interval":
        changed.stage.guidance_scale = 2.0
    with pytest.raises(UserError) as caught:
        validate_training(changed)
    line = str(caught.value)
    assert "\n" not in line
    assert line.startswith(f"{key}=")


def test_parts_of_a_callback_are_checked_without_being_built() -> None:
    """Building them would load Inception and read files."""
    data = (*TINY, "resolution=16", DATA, "callbacks=evaluated")
    validate_training(_compose("train", *data))
    with pytest.raises(UserError, match=r"^callbacks\.evaluation\.evaluator\.batch_size=many: must be a whole number"):
        validate_training(_compose("train", *data, "callbacks.evaluation.evaluator.batch_size=many"))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+network.blokcs=1", r"^network\.blokcs=1: _target_=relay_diffusion\.networks\.UNet has no such option"),
        ("+stage.sampler.step=4", r"^stage\.sampler\.step=4: _target_=.*EDMSampler has no such option"),
        (
            "stage.sampler._target_=nowhere.Sampler",
            r"^stage\.sampler\._target_=nowhere\.Sampler: there is no module nowhere \(it must be on PYTHONPATH",
        ),
        (
            "stage.sampler._target_=relay_diffusion.samplers.EDMSample",
            r"^stage\.sampler\._target_=.*: relay_diffusion\.samplers has no EDMSample; did you mean EDMSampler\?$",
        ),
        (
            "stage.sampler._target_=relay_diffusion.samplers.EDMSampler.nothing.x",
            r"^stage\.sampler\._target_=.*: relay_diffusion\.samplers\.EDMSampler has no nothing$",
        ),
        ("stage.sampler._target_=torch.nn.functional", r"must be the full name of a class or function$"),
        ("stage.optimizer.lr=inf", r"^stage\.optimizer\.lr=inf: must be finite"),
        ("~stage.optimizer._partial_", r"^stage\.optimizer\._partial_=false: .* add `_partial_: true`"),
        (
            "~stage.optimizer._target_",
            r"^stage\.optimizer=.*: must be a mapping that names its class as _target_$",
        ),
        ("stage.optimizer.lr=fast", r"^stage\.optimizer\.lr=fast: must be a number$"),
        ("stage.optimizer.betas=[a]", r"^stage\.optimizer\.betas=.*: must be a list, each item a number$"),
        (
            "stage.optimizer.betas=[2.0,0.9]",
            r"^stage\.optimizer\.betas=\[2\.0, 0\.9\]: each must be at least 0 and below 1$",
        ),
        ("stage.optimizer.lr=-0.1", r"^stage\.optimizer\.lr=-0\.1: must be at least 0$"),
        ("stage.optimizer.eps=-1", r"^stage\.optimizer\.eps=-1: must be at least 0$"),
        ("+stage.optimizer.weight_decay=-2", r"^stage\.optimizer\.weight_decay=-2: must be at least 0$"),
        ("trainer.accelerator=gpus", r"^trainer\.accelerator=gpus: use one of auto, cpu, gpu, cuda, mps, tpu$"),
        (
            "trainer.strategy=dpp",
            r"^trainer\.strategy=dpp: is unknown; use strategy=single, strategy=ddp or strategy=ddp",
        ),
        (
            "+trainer.strategy={_target_:lightning.pytorch.strategies.DDPStrategy,process_group_backend:glo}",
            r"^trainer\.strategy\.process_group_backend=glo: is not available; use gloo on CPUs, nccl on GPUs, or null",
        ),
        (
            "+trainer.strategy={_target_:lightning.pytorch.strategies.DDPStrategy,process_group_backend:'cpu:a:b'}",
            r"^trainer\.strategy\.process_group_backend=cpu:a:b: is not available; use gloo on CPUs",
        ),
        ("~stage.loss", r"^stage: .*missing .*'loss'"),
    ],
)
def test_unknown_options_of_a_class(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        validate_training(_compose("train", *TINY, "resolution=16", DATA, override))


def test_a_negative_momentum_is_refused() -> None:
    given = ["~stage.optimizer.betas", "~stage.optimizer.eps", "stage.optimizer._target_=torch.optim.SGD"]
    option = "+stage.optimizer.momentum=-0.5"
    with pytest.raises(UserError, match=r"^stage\.optimizer\.momentum=-0\.5: must be at least 0$"):
        validate_training(_compose("train", *TINY, "resolution=16", DATA, *given, option))


@pytest.mark.parametrize("option", ["trainer.accelerator=gpus", "trainer.strategy=dpp"])
def test_devices_of_sampling(option: str) -> None:
    with pytest.raises(UserError, match=f"^{option}: "):
        validate_sampling(_compose("sample", "relay=emoji", option))


@pytest.mark.parametrize("backend", ["gloo", "GLOO", "cpu:gloo", "null"])
def test_available_backends_are_accepted(backend: str) -> None:
    option = "trainer.strategy.process_group_backend"
    given = f"{option}=null" if backend == "null" else f"{option}='{backend}'"
    validate_training(_compose("train", *TINY, "resolution=16", DATA, "strategy=ddp_cpu", given))


def test_a_group_in_the_wrong_package() -> None:
    changed = _compose("train", *TINY, "resolution=16", DATA)
    OmegaConf.set_struct(changed, False)
    changed.optimizer = changed.stage.pop("optimizer")
    with pytest.raises(UserError, match=r"^stage\.optimizer=None: .*; does its yaml begin with `# @package stage"):
        validate_training(changed)


def test_a_module_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "failing_parts.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(tmp_path)
    for target, reason in (
        ("failing_parts.Sampler", r"cannot be imported \(No module named 'no_such_package'\)"),
        ("relay_diffusion.samplers.Nothing", "relay_diffusion.samplers has no Nothing"),
    ):
        with pytest.raises(UserError, match=reason):
            validate_training(_compose("train", *TINY, "resolution=16", DATA, f"stage.sampler._target_={target}"))
    assert not caplog.records


HOOKS = """
from lightning.pytorch.callbacks import Callback

class Mine(Callback):
    def setup(self, trainer, pl_module, stage): ...
    def on_fit_start(self, trainer, pl_module, more=None): ...

class Keyword(Callback):
    def setup(self, trainer, pl_module, *, stage): ...

class Static(Callback):
    @staticmethod
    def on_fit_start(trainer, pl_module): ...

    @classmethod
    def on_fit_end(cls, trainer, pl_module): ...

class Fewer(Mine):
    def on_train_batch_end(self, trainer, pl_module, outputs): ...

class Other(Mine):
    def setup(self, trainer, pl_module, when): ...
"""


def test_hooks_with_other_arguments_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_hooks.py").write_text(HOOKS)
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("Mine", "Keyword", "Static"):
        validate_training(_compose("train", *TINY, "resolution=16", DATA, f"+callbacks.mine._target_=my_hooks.{name}"))
    for name, message in (
        (
            "Fewer",
            r"on_train_batch_end must take the arguments \(self, trainer, pl_module, outputs, batch, batch_idx\): too",
        ),
        ("Other", r"setup must take the arguments \(self, trainer, pl_module, stage=\): missing a required argument"),
    ):
        option = f"+callbacks.mine._target_=my_hooks.{name}"
        with pytest.raises(UserError, match=rf"^callbacks\.mine: {name}\.{message}"):
            validate_training(_compose("train", *TINY, "resolution=16", DATA, option))


def test_a_callback_of_another_class_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_plain.py").write_text("class Plain: ...")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        UserError, match=r"^callbacks\.mine: Plain must be a subclass of lightning\.pytorch\.callbacks\."
    ):
        validate_training(_compose("train", *TINY, "resolution=16", DATA, "+callbacks.mine._target_=my_plain.Plain"))


@pytest.mark.parametrize("flag", ["_target_", "_partial_", "_recursive_"])
@pytest.mark.parametrize("value", [[], [True], {}, {"a": True}, 3])
def test_keys_of_hydra_are_checked(flag: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"stage\.optimizer\.{flag}"):
        validate_training(_changed(TRAIN, f"stage.optimizer.{flag}", value))
