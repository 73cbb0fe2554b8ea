"""Start and end of a run: the number of classes, and what is printed."""

import shlex

import pytest
from omegaconf import OmegaConf
from PIL import Image

from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.run import sample
from relay_diffusion.training.run import train
from relay_diffusion.utils.messages import override
from support import TINY, assert_same_weights

INFERRED = "network.num_classes=null"


@pytest.fixture
def folder(tmp_path):
    """Images without classes."""
    path = tmp_path / "images"
    path.mkdir()
    for number in range(4):
        Image.effect_noise((16, 16), 10 + 40 * number).convert("RGB").save(path / f"{number}.png")
    return path


def test_the_number_of_classes_is_that_of_the_data(fit, tmp_path, capsys):
    """The run equals one with that number, to the last bit."""
    inferred = fit("inferred", 8, INFERRED, "stage.label_dropout=0.1")
    assert " 24 images of 2 classes" in capsys.readouterr().out
    assert_same_weights(inferred.state_dict(), fit("given", 8, "stage.label_dropout=0.1").state_dict())
    assert OmegaConf.load(tmp_path / "inferred/config.yaml").network.num_classes == 2
    loaded = load_stage(tmp_path / "inferred")
    assert (loaded.num_classes, loaded.info.class_names) == (2, ["dark", "light"])
    assert fit("inferred", 16, INFERRED, "stage.label_dropout=0.1").images_seen == 16  # resumes


def test_images_without_classes_train_without_label_dropout(fit, folder):
    """A preset with stage.label_dropout fits images with and without classes."""
    stage = fit("run", 4, INFERRED, f"data.dataset.path={folder}", "data.dataset.subset=''", "stage.label_dropout=0.1")
    assert (stage.num_classes, stage.label_dropout) == (0, 0.0)


def test_classes_that_are_ignored_have_no_label_dropout(fit, capsys):
    stage = fit("run", 4, "network.num_classes=0", "stage.label_dropout=0.1")
    assert (stage.num_classes, stage.label_dropout) == (0, 0.0)
    assert "note: stage.label_dropout is 0, because the network has neither classes nor text" in capsys.readouterr().out


def test_guidance_without_classes_is_refused_before_training(configuration, folder, tmp_path):
    cfg = configuration(
        "train", *TINY, "resolution=16", INFERRED, f"data.dataset.path={folder}", "data.dataset.subset=''",
        "stage.guidance_scale=2", "stage.label_dropout=0.1", f"run_dir={tmp_path / 'run'}",
    )  # fmt: skip
    before = OmegaConf.to_container(cfg.network)
    validate_training(cfg)
    with pytest.raises(UserError, match=r"^stage\.guidance_scale=2, but the network is unconditional"):
        train(cfg)
    assert OmegaConf.to_container(cfg.network) == before
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stage", "relay", "name"), [("base", "one_stage", "base"), ("relay", "two_stages", "relay"), ("cascade",) * 3]
)
def test_training_ends_with_a_command_that_samples_the_stage(configuration, fit, tmp_path, capsys, stage, relay, name):
    """Also in a directory whose name needs quotes."""
    directory = tmp_path / "my run, it's new"
    fit("run", 4, *shlex.split(override("run_dir", str(directory))), stage=stage)
    words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert words[:4] == ["sample:", "python", "sample.py", f"relay={relay}"]
    assert words[4].startswith(f"relay.stages.{name}.path=")
    cfg = configuration("sample", *words[3:], f"output={tmp_path / 'samples'}", "trainer.accelerator=cpu")
    cfg.relay.seeds = "0-3"
    validate_sampling(cfg)
    assert cfg.relay.stages[name].path == str(directory)
    assert sample(cfg)["images"] == (4 if stage == "base" else 16)
    assert (tmp_path / "samples/relay.png").exists()
