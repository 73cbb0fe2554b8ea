"""Stages with classes of other packages need trust."""

import json
import sys

import pytest
import torch

from relay_diffusion.checkpoints.loading import load_stage, read_checkpoint
from relay_diffusion.cli import convert_checkpoint as convert
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.run import sample
from support import TINY, run

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


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Create the package my_parts and one with the same prefix."""
    folder = tmp_path / "packages"
    for name in ("my_parts", "my_parts_2"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    for name in ("my_parts", "my_parts_2"):
        sys.modules.pop(name, None)


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
@pytest.mark.parametrize("part", PARTS)
def test_parts_of_a_trusted_package_are_trained_continued_and_loaded(fit, tmp_path, part):
    options = (*PARTS[part], "trusted=[my_parts]")
    fit("run", 4, *options)
    assert fit("run", 8, *options).images_seen == 8
    stage = load_stage(tmp_path / "run", trusted=["my_parts"])
    built = {
        "sampler": stage.sampler, "loss": stage.loss, "corruption": stage.corruption, "network": stage.denoiser.network,
    }  # fmt: skip
    assert type(built[part]).__module__ == "my_parts"
    assert stage.sample((1, 3, 16, 16), [0]).shape == (1, 3, 16, 16)
    for trusted in ((), ["my_parts_2"], ["my_part"], ["my_parts.inner"]):
        with pytest.raises(
            UserError, match=r"last\.ckpt names 'my_parts\.My.*if you trust it, add trusted=\[my_parts\]"
        ):
            load_stage(tmp_path / "run", trusted=trusted)
    with pytest.raises(UserError, match=r"^stage\..* is my_parts\."):
        fit("run", 12, *PARTS[part])  # nor is it continued


def test_the_optimizer_may_come_from_anywhere(fit, tmp_path):
    fit("run", 4, "stage.optimizer._target_=my_parts.MyAdam")
    assert load_stage(tmp_path / "run").images_seen == 4


def test_trusted_must_be_a_list_of_packages(fit, tmp_path):
    fit("run", 4, *PARTS["sampler"], "trusted=[my_parts]")
    for trusted, message in (
        ("my_parts", r"trusted=my_parts: must be a list of packages, e\.g\. \[my_package\]"),
        ([""], "trusted holds : must be names of packages"),
        (["my-parts"], "trusted holds my-parts: must be names"),
        ([5], "trusted holds 5: must be names"),
        (None, "trusted=None: must be a list"),
    ):
        with pytest.raises(UserError, match=message):
            load_stage(tmp_path / "run", trusted=trusted)


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
def test_a_trusted_package_allows_its_own_classes_only(fit, tmp_path, target, message):
    fit("run", 4, *PARTS["sampler"], "trusted=[my_parts]")
    content = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)
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
def test_a_guide_and_an_export_need_the_same_trust(fit, tmp_path):
    fit("plain", 4)
    fit("run", 4, *PARTS["sampler"], "trusted=[my_parts]")
    scaled = {"guidance_scale": 2.0}
    with pytest.raises(UserError, match=r"names 'my_parts\.MySampler'"):
        load_stage(tmp_path / "plain", changes=scaled, guide=tmp_path / "run")
    assert (
        load_stage(tmp_path / "plain", changes=scaled, guide=tmp_path / "run", trusted=["my_parts"]).guide is not None
    )
    options = convert.ConvertOptions(str(tmp_path / "run"), str(tmp_path / "shared"))
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


@pytest.mark.slow
def test_training_and_sampling_from_the_command_line(package, small_zip, tmp_path, configuration):
    training = [
        "train.py", *TINY, "resolution=16", f"data.dataset.path={small_zip}", "trainer.max_images=4",
        *PARTS["sampler"], f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    refused = run(*training, PYTHONPATH=f"{package}:{':'.join(sys.path)}")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith("error: stage.sampler is my_parts.MySampler, a class outside")
    trained = run(*training, "trusted=[my_parts]", PYTHONPATH=f"{package}:{':'.join(sys.path)}")
    assert trained.returncode == 0, trained.stderr
    sampling = ["relay=one_stage", f"relay.stages.base.path={tmp_path / 'run'}", "seeds=0-1", "trainer.accelerator=cpu"]
    sampling.append(f"run_dir={tmp_path / 'samples'}")
    with pytest.raises(UserError, match=r"relay\.stages\.base: .*if you trust it, add trusted=\[my_parts\]"):
        sample(configuration("sample", *sampling))
    assert sample(configuration("sample", *sampling, "trusted=[my_parts]"))["sampled_now"] == 2
