"""Stages with classes of other packages need trust."""

import json
import sys

import pytest
import torch

from memoized import composed
from relay_diffusion.checkpoints.loading import load_stage, read_checkpoint, stored_sampler, with_steps
from relay_diffusion.cli import convert_checkpoint as convert
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.run import sample
from relay_diffusion.training.run import train
from support import TINY

PACKAGE = '''
from relay_diffusion.diffusion import DenoisingLoss, GaussianCorruption
from relay_diffusion.networks import UNet
from relay_diffusion.samplers import EDMSampler
from torch.optim import Adam


class MySampler(EDMSampler):
    pass


class MyLoss(DenoisingLoss):
    pass


class MyCorruption(GaussianCorruption):
    pass


class MyUNet(UNet):
    pass


class MyAdam(Adam):
    pass


class Reading(EDMSampler):
    """Looks at numbers of a tensor on the default device."""

    def __init__(self, **options):
        super().__init__(**options)
        import torch
        self.first = float(torch.ones(1))


def make_sampler(**options):
    return EDMSampler(**options)
'''
PARTS = {
    "sampler": ["stage.sampler._target_=my_parts.MySampler"],
    "loss": ["stage.loss._target_=my_parts.MyLoss"],
    "corruption": ["stage.corruption._target_=my_parts.MyCorruption"],
    "network": ["network._target_=my_parts.MyUNet"],
}


pytestmark = pytest.mark.usefixtures("package")


def write_packages(root):
    folder = root / "packages"
    for name in ("my_parts", "my_parts_2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(PACKAGE)
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Create the package my_parts and one with the same prefix."""
    folder = write_packages(tmp_path)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("my_parts", "my_parts_2"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def trusted_run(tmp_path_factory, small_zip):
    """Directory of a run with a sampler of my_parts, which tests only read."""
    folder = tmp_path_factory.mktemp("trusted")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(write_packages(folder)))
        options = [*TINY, "resolution=8", f"data.dataset.path={small_zip}", *PARTS["sampler"], "trusted=[my_parts]"]
        train(composed("train", *options, "trainer.max_images=4", f"run_dir={folder / 'run'}"))
    sys.modules.pop("my_parts", None)
    return folder / "run"


@pytest.mark.parametrize("part", PARTS)
def test_a_stage_that_cannot_be_loaded_is_rejected_before_training(fit, tmp_path, part):
    name = PARTS[part][0].partition("=")[2]
    key = {"network": "denoiser.network"}.get(part, part)
    message = rf"^stage\.{key} is {name}, a class outside relay_diffusion: add trusted=\[{{}}my_parts\], which its"
    for trusted, before in (("[]", ""), ("[my_parts_2]", "my_parts_2,")):
        with pytest.raises(UserError, match=message.format(before)):
            fit("run", 8, *PARTS[part], f"trusted={trusted}")
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.slow
def test_parts_of_a_trusted_package_are_trained_continued_and_loaded(fit, tmp_path):
    parts = [override for overrides in PARTS.values() for override in overrides]
    options = (*parts, "trusted=[my_parts]")
    fit("run", 4, *options)
    assert fit("run", 8, *options).images_seen == 8
    stage = load_stage(tmp_path / "run", trusted=["my_parts"])
    for part in (stage.sampler, stage.loss, stage.corruption, stage.denoiser.network):
        assert type(part).__module__ == "my_parts"
    assert stage.sample((1, 3, 16, 16), [0]).shape == (1, 3, 16, 16)
    with pytest.raises(UserError, match=r"^stage\..* is my_parts\."):
        fit("run", 12, *parts)  # nor is it continued


@pytest.mark.parametrize("part", PARTS)
def test_each_part_needs_trust_when_it_is_loaded(trusted_run, tmp_path, part):
    content = torch.load(trusted_run / "checkpoints/last.ckpt", weights_only=True)
    config = content["stage_config"]
    config["sampler"]["_target_"] = "relay_diffusion.samplers.EDMSampler"
    torch.save(content, tmp_path / "own.ckpt")
    load_stage(tmp_path / "own.ckpt")
    owner = config["denoiser"] if part == "network" else config
    owner[part]["_target_"] = PARTS[part][0].partition("=")[2]
    torch.save(content, tmp_path / "last.ckpt")
    for trusted in ((), ["my_parts_2"], ["my_part"], ["my_parts.inner"]):
        with pytest.raises(
            UserError, match=r"last\.ckpt names 'my_parts\.My.*if you trust it, add trusted=\[my_parts\]"
        ):
            load_stage(tmp_path / "last.ckpt", trusted=trusted)
    assert load_stage(tmp_path / "last.ckpt", trusted=["my_parts"]).images_seen == 4


def test_the_optimizer_may_come_from_anywhere(fit, tmp_path):
    fit("run", 4, "stage.optimizer._target_=my_parts.MyAdam")
    assert load_stage(tmp_path / "run").images_seen == 4


def test_trusted_must_be_a_list_of_packages(trusted_run):
    for trusted, message in (
        ("my_parts", r"trusted=my_parts: must be a list of packages, e\.g\. \[my_package\]"),
        ([""], "trusted holds : must be names of packages"),
        (["my-parts"], "trusted holds my-parts: must be names"),
        ([5], "trusted holds 5: must be names"),
        (None, "trusted=None: must be a list"),
    ):
        with pytest.raises(UserError, match=message):
            load_stage(trusted_run, trusted=trusted)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("my_parts.make_sampler", "names my_parts.make_sampler, which is not a class"),
        ("my_parts.Missing", "not a class that can be imported here"),
        ("my_parts.GaussianCorruption.__init__", "not a class"),
        (
            "my_parts.Adam",
            r"names my_parts\.Adam, which comes from torch\.optim\.adam, outside relay_diffusion or my_parts",
        ),
        ("my_parts_2.MySampler", r"names 'my_parts_2\.MySampler', which is not a class of relay_diffusion or my_parts"),
        ("os.system", r"names 'os\.system', which is not a class of relay_diffusion or my_parts"),
        ("relay_diffusion_2.X", r"names 'relay_diffusion_2\.X', which is not a class of"),
    ],
)
def test_a_trusted_package_allows_its_own_classes_only(trusted_run, tmp_path, target, message):
    content = torch.load(trusted_run / "checkpoints/last.ckpt", weights_only=True)
    content["stage_config"]["sampler"]["_target_"] = target
    torch.save(content, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=message):
        load_stage(tmp_path / "evil.ckpt", trusted=["my_parts"])


def test_stages_that_cannot_be_rebuilt_are_rejected_before_training(fit, configuration, small_zip):
    with pytest.raises(UserError, match=r"^stage: its checkpoint could not be loaded: last\.ckpt.* not a class"):
        fit("run", 4, "stage.sampler._target_=my_parts.make_sampler", "trusted=[my_parts]")
    reading = ("stage.sampler._target_=my_parts.Reading", f"data.dataset.path={small_zip}", "trusted=[my_parts]")
    with pytest.raises(UserError, match=r"^stage\.sampler: .*on the meta device"):
        validate_training(configuration("train", *TINY, "resolution=16", *reading))


@pytest.mark.slow
def test_a_loaded_sampler_of_a_trusted_package_takes_other_steps(trusted_run):
    stage = load_stage(trusted_run, trusted=["my_parts"])
    config = stored_sampler(stage)
    sampler = with_steps(config, 3, "steps")
    assert type(sampler) is type(stage.sampler)
    assert type(sampler).__module__ == "my_parts"
    assert sampler.evaluations == 5 != stage.sampler.evaluations
    with pytest.raises(UserError, match=r"^steps: "):
        with_steps(config, 0, "steps")


def test_a_guide_and_an_export_need_the_same_trust(relay_folder, trusted_run, tmp_path):
    plain = relay_folder / "base"
    scaled = {"guidance_scale": 2.0}
    with pytest.raises(UserError, match=r"names 'my_parts\.MySampler'"):
        load_stage(plain, changes=scaled, guide=trusted_run)
    assert load_stage(plain, changes=scaled, guide=trusted_run, trusted=["my_parts"]).guide is not None
    options = convert.ConvertOptions(str(trusted_run), str(tmp_path / "shared"))
    with pytest.raises(UserError, match=r"names 'my_parts\.MySampler'"):
        convert.convert(options)
    options.trusted = "my_parts"
    convert.convert(options)
    assert json.loads((tmp_path / "shared/stage.json").read_text())["stage_config"]["sampler"]["_target_"] == (
        "my_parts.MySampler"
    )
    assert type(load_stage(tmp_path / "shared", trusted=["my_parts"]).sampler).__name__ == "MySampler"


@pytest.mark.slow
def test_resuming_and_init_read_stages_of_trusted_packages(fit, tmp_path):
    options = (*PARTS["network"], "trusted=[my_parts]")
    fit("run", 4, *options)
    assert fit("resumed", 8, *options, f"resume={tmp_path / 'run'}").images_seen == 8
    assert fit("begun", 4, *options, f"init={tmp_path / 'run'}").images_seen == 4
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
    content["state_dict"]["denoiser.network.conv_in.weight"] = torch.zeros(3)
    torch.save(content, tmp_path / "wrong.ckpt")
    with pytest.raises(UserError, match="do not fit the network"):
        read_checkpoint(tmp_path / "wrong.ckpt", ["my_parts"])


def test_sampling_needs_the_same_trust(trusted_run, tmp_path, configuration):
    sampling = ["relay=one_stage", f"relay.stages.base.path={trusted_run}", "seeds=0-1", "trainer.accelerator=cpu"]
    sampling.append(f"run_dir={tmp_path / 'samples'}")
    with pytest.raises(UserError, match=r"relay\.stages\.base: .*if you trust it, add trusted=\[my_parts\]"):
        sample(configuration("sample", *sampling))
    assert sample(configuration("sample", *sampling, "trusted=[my_parts]"))["sampled_now"] == 2
