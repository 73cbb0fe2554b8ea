"""Write checkpoints atomically, keep them, skip damaged ones, and resume."""

import copy
import errno
import re
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image

from relay_diffusion.checkpoints.export import export_stage
from relay_diffusion.checkpoints.loading import load_stage
from relay_diffusion.config.train import validate_training
from relay_diffusion.data.zip_writer import image_zip
from relay_diffusion.errors import UserError
from relay_diffusion.training.callbacks.stopping import StopAtImages
from relay_diffusion.training.resume import check_same_stage
from support import TINY, assert_same_weights, run, weights_of


@pytest.mark.parametrize(
    "stage", ["base", *(pytest.param(name, marks=pytest.mark.slow) for name in ("relay", "cascade"))]
)
def test_interrupted_and_resumed_training_equals_uninterrupted(fit, tmp_path, stage):
    dropout = ["network.dropout=0.2", "stage.label_dropout=0.3", "augment=edm", "stage.augment.probability=0.5"]
    dropout.append("data.batch_size=8")
    fit("whole", 32, *dropout, stage=stage)
    fit("parts", 16, *dropout, stage=stage)
    halfway = weights_of(tmp_path / "parts/checkpoints/last.ckpt")
    fit("parts", 32, *dropout, stage=stage)
    resumed = weights_of(tmp_path / "parts/checkpoints/last.ckpt")
    assert_same_weights(weights_of(tmp_path / "whole/checkpoints/last.ckpt"), resumed)
    assert any(not torch.equal(halfway[key], resumed[key]) for key in halfway)


@pytest.mark.slow
def test_own_progress_comes_before_resume(fit, trained, tmp_path):
    trained("first", 8)
    fit("second", 16, f"resume={tmp_path / 'first'}")
    assert fit("second", 20, f"resume={tmp_path / 'first'}", "callbacks.log.every_n_images=4").images_seen == 20
    rows = (tmp_path / "second/log/metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows[1:]] == ["16", "20"]


@pytest.mark.slow
def test_a_completed_run_is_reported_and_left_unchanged(fit, trained, tmp_path, capsys):
    trained("run", 8)
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert fit("run", 8) is None
    said = "training is complete (8 images seen); raise trainer.max_images to continue"
    assert said in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()} == files
    assert fit("run", 12).images_seen == 12
    assert "trained on 12 images" in capsys.readouterr().out.splitlines()[-2]  # before the command of sample.py


def test_a_new_run_that_would_train_nothing_is_refused(fit, trained, tmp_path):
    """A new run without training images is not a completed run."""
    trained("first", 8)
    with pytest.raises(UserError, match=r"^resume=.*first.* has seen 8 images already: raise trainer\.max_images=8"):
        fit("second", 8, f"resume={tmp_path / 'first'}")
    assert not (tmp_path / "second").exists()


@pytest.mark.slow
def test_a_completed_run_ends_without_an_error(trained, small_zip):
    """Scripts with `set -e` and job arrays depend on the exit code."""
    options = [*TINY, "resolution=16", f"data.dataset.path={small_zip}", f"run_dir={trained('run', 8)}"]
    result = run("train.py", *options, "trainer.max_images=8")
    assert result.returncode == 0, result.stderr
    assert "training is complete (8 images seen); raise trainer.max_images" in result.stdout.splitlines()[-1]


@pytest.mark.slow
def test_the_old_checkpoint_is_freed_before_training_resumes(fit, trained, tmp_path, monkeypatch):
    trained("run", 8)
    last, mapped = tmp_path / "run/checkpoints/last.ckpt", []
    plain = StopAtImages.on_train_batch_end

    def on_train_batch_end(self, trainer, pl_module, *args):
        mapped.append([line for line in Path("/proc/self/maps").read_text().splitlines() if str(last) in line])
        plain(self, trainer, pl_module, *args)

    monkeypatch.setattr(StopAtImages, "on_train_batch_end", on_train_batch_end)
    with last.open("rb") as file:
        content = torch.load(file.name, weights_only=True, mmap=True)
        assert str(last) in Path("/proc/self/maps").read_text()  # that is where it would show
    del content
    fit("run", 16)
    assert mapped == [[], []]
    fit("on", 8, f"init={tmp_path / 'run'}")
    fit("on", 12, f"resume={tmp_path / 'run'}")
    assert mapped == [[]] * 5


@pytest.mark.slow
def test_every_changed_setting_is_reported(fit, trained, capsys):
    trained("run", 8)
    changed = ["trainer.precision=bf16-mixed", "callbacks.ema.half_life_images=1000", "callbacks.ema.ramp_up=null"]
    fit("run", 12, *changed, "data.num_workers=1", "data.dataset.cache=true")
    said = capsys.readouterr().out
    assert (
        " with callbacks.ema.half_life_images 500000 -> 1000, callbacks.ema.ramp_up 0.05 -> None, "
        "trainer.precision 32-true -> bf16-mixed, "
    ) in said
    assert "note:" not in said
    fit("run", 16, "~callbacks.ema", "data.dataset.x_flip=false")
    said = capsys.readouterr().out
    assert "callbacks.ema EMA -> not set, data.dataset.x_flip True -> False, trainer.precision bf16-mixed" in said
    assert "note: data.dataset.x_flip changed, so the order of the images changes" in said


@pytest.mark.slow
def test_a_checkpoint_without_record_continues(fit, trained, tmp_path, capsys):
    trained("run", 8)
    file = tmp_path / "run/checkpoints/last.ckpt"
    old = torch.load(file, weights_only=True)
    del old["run"]
    torch.save(old | {"dealt": {"devices": 1, "data.seed": 0, "images": 48}}, file)
    assert fit("run", 12, "data.batch_size=2").images_seen == 12
    assert "continues " in (said := capsys.readouterr().out)
    assert " with " not in said


def test_a_checkpoint_with_data_accumulate_is_resumed(fit, trained, tmp_path, capsys):
    trained("run", 8, "trainer.accumulate_grad_batches=2")
    file = tmp_path / "run/checkpoints/last.ckpt"
    old = torch.load(file, weights_only=True)
    old["run"]["config"]["data"]["accumulate"] = old["run"]["config"]["trainer"].pop("accumulate_grad_batches")
    old["run"]["config"]["trainer"]["accumulate"] = 2
    torch.save(old, file)
    fit("run", 12, "trainer.accumulate_grad_batches=2")
    assert " with " not in capsys.readouterr().out.partition(" parameters, ")[0]
    torch.save(old, file)
    fit("run", 12)
    assert " with trainer.accumulate_grad_batches 2 -> 1, " in capsys.readouterr().out


@pytest.mark.slow
def test_a_resume_may_change_the_learning_rate_but_not_the_optimizer(fit, trained):
    trained("run", 4)
    with pytest.raises(UserError, match="optimizer"):
        fit("run", 8, "stage.optimizer.eps=1e-6")
    assert fit("run", 8, "stage.optimizer.lr=5e-4").images_seen == 8


@pytest.mark.slow
def test_a_resume_may_change_settings_of_speed_and_memory(fit, trained, tmp_path):
    trained("run", 4, "stage.optimizer.fused=false")
    file = tmp_path / "run/checkpoints/last.ckpt"
    old = torch.load(file, weights_only=True)
    for option in ("checkpoint_levels", "condition_channels"):  # as before there were such options
        del old["stage_config"]["denoiser"]["network"][option]
    del old["stage_config"]["optimizer"]["fused"], old["stage_config"]["cuda_graphs"]
    torch.save(old, file)
    assert load_stage(file).cuda_graphs
    assert not load_stage(file, changes={"cuda_graphs": False}).cuda_graphs
    stage = fit("run", 8, "network.checkpoint_levels=[0]", "stage.optimizer.fused=true")
    assert stage.images_seen == 8
    optimizer = stage.trainer.optimizers[0]
    assert all(group["fused"] for group in optimizer.param_groups)
    assert torch.load(file, weights_only=True)["stage_config"]["denoiser"]["network"]["checkpoint_levels"] == [0]


def test_older_relay_runs_have_the_default_log_normal(configuration):
    """Their schedules lack p_mean and p_std."""
    mine = OmegaConf.to_container(configuration("train", "stage=relay", "resolution=64").stage, resolve=True)
    old = copy.deepcopy(mine)
    del old["corruption"]["schedule"]["p_mean"], old["corruption"]["schedule"]["p_std"]
    check_same_stage(Path("old.ckpt"), {"stage_config": old}, mine)
    mine["corruption"]["schedule"]["p_std"] = 1.0
    with pytest.raises(UserError, match="corruption"):
        check_same_stage(Path("old.ckpt"), {"stage_config": old}, mine)


@pytest.mark.slow
def test_kept_checkpoints(fit, tmp_path):
    fit("run", 16, "callbacks.checkpoints.every_n_images=4", "callbacks.checkpoints.keep=2")
    fit("run", 20, "callbacks.checkpoints.every_n_images=4", "callbacks.checkpoints.keep=0")  # removes none
    names = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["images-000000000008.ckpt", "images-000000000012.ckpt", "last.ckpt"]


@pytest.mark.slow
def test_a_damaged_checkpoint_is_skipped(fit, trained, tmp_path, capsys):
    """A truncated last.ckpt falls back to the previous checkpoint."""
    directory, often = tmp_path / "run/checkpoints", "callbacks.checkpoints.every_n_images=4"
    trained("run", 12, often)
    last, before = directory / "last.ckpt", directory / "images-000000000008.ckpt"
    whole = weights_of(last)
    last.write_bytes(last.read_bytes()[:1000])
    good = before.read_bytes()
    assert fit("run", 12, often).images_seen == 12
    assert "last.ckpt cannot be read" in capsys.readouterr().err
    assert_same_weights(weights_of(last), whole)
    assert before.read_bytes() == good
    spoilt = torch.load(last, weights_only=True)
    next(iter(spoilt["state_dict"].values())).fill_(torch.nan)  # training diverged
    torch.save(spoilt, last)
    assert fit("run", 12, often).images_seen == 12
    assert "not finite" in capsys.readouterr().err
    assert_same_weights(weights_of(last), whole)
    for path in directory.iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read .*: delete them to start a new run"):
        fit("run", 16, often)


def test_an_unwritable_directory_is_reported_before_training(fit, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/below/.probe cannot be written: Not a directory"):
        fit("run", 4, f"callbacks.checkpoints.directory={tmp_path / 'file/below'}")


@pytest.mark.slow
def test_a_full_disk_keeps_the_previous_checkpoint(fit, trained, tmp_path):
    trained("run", 4)
    last = tmp_path / "run/checkpoints/last.ckpt"
    content = last.read_bytes()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(content) // 2, hard))  # no file may be larger
    try:
        with pytest.raises(UserError, match=r"last\.ckpt cannot be written after 8 images .*of 4 images is intact"):
            fit("run", 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert last.read_bytes() == content
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]


@pytest.mark.slow
def test_a_resumed_run_reports_changed_values(fit, trained, capsys):
    trained("run", 8)
    fit("run", 16, "data.batch_size=8", "trainer.accumulate_grad_batches=2")
    assert "with data.batch_size 4 -> 8, trainer.accumulate_grad_batches 1 -> 2, " in capsys.readouterr().out
    lr = fit("run", 20, "data.batch_size=8", "trainer.accumulate_grad_batches=2").info.config["optimizer"]["lr"]
    assert "with" not in capsys.readouterr().out.splitlines()[0].rpartition("last.ckpt")[2]
    fit("run", 32, "data.batch_size=8", "trainer.accumulate_grad_batches=2", "stage.optimizer.lr=5e-5", "data.seed=3")
    assert f"with data.seed 0 -> 3, stage.optimizer.lr {lr} -> 5e-05," in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_resumed_on_other_images_reports_it(fit, trained, small_zip, tmp_path, capsys):
    with zipfile.ZipFile(small_zip) as archive:
        archive.extractall(tmp_path / "images")
    trained("run", 8, "data.dataset.x_flip=false")
    fit("run", 16, f"data.dataset.path={tmp_path / 'images'}", "data.dataset.x_flip=true")
    said = capsys.readouterr().out
    changed = f"with data.dataset.path {small_zip} -> {tmp_path / 'images'}, data.dataset.x_flip False -> True, "
    assert re.search(re.escape(changed) + "[0-9,]+ parameters, 24 images", said)  # mirrored ones do not count
    assert "note: data.dataset.x_flip changed, so the order of the images changes" in said


def zip_of_classes(path, names):
    with image_zip(path, names) as archive:
        for number in range(2 * len(names)):
            archive.add(f"train/{number}.png", Image.new("RGB", (16, 16)), number % len(names))
    return path


@pytest.mark.slow
def test_a_resume_with_other_classes_is_rejected(fit, trained, tmp_path):
    trained("run", 8)
    other = zip_of_classes(tmp_path / "other.zip", ["light", "dark"])
    with pytest.raises(UserError, match=r"other classes .*class 0 was dark, is light\): use another run_dir"):
        fit("run", 16, f"data.dataset.path={other}", "data.dataset.subset=''")


def test_checkpoints_without_hard_links(fit, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    fit("run", 8, "callbacks.checkpoints.every_n_images=4", "callbacks.checkpoints.keep=1")
    kept, last = sorted((tmp_path / "run/checkpoints").iterdir())
    assert (kept.name, last.name) == ("images-000000000004.ckpt", "last.ckpt")
    assert torch.load(kept, weights_only=True)["images_seen"] == 4


@pytest.mark.slow
def test_init_starts_from_the_weights_of_another_run(fit, trained, tmp_path, capsys):
    """Load EMA weights and count images from 0; own checkpoints have priority."""
    stage = load_stage(trained("trained", 16))
    weights = stage.denoiser.state_dict()
    export_stage(stage.info.config, weights, tmp_path / "export", class_names=stage.info.class_names)
    for source in ("trained", "export"):
        still = fit(source + "-on", 4, f"init={tmp_path / source}", "stage.optimizer.lr=0")
        assert still.images_seen == 4
        assert f"with the weights of {tmp_path / source}" in capsys.readouterr().out
        assert_same_weights(still.state_dict(), stage.state_dict())
    moved = fit("trained-on", 8, f"init={tmp_path / 'trained'}", "callbacks.log.every_n_images=4")
    assert moved.images_seen == 8
    assert "continues" in capsys.readouterr().out


@pytest.mark.slow
def test_init_takes_raw_weights_without_an_average(fit, trained, tmp_path):
    trained("trained", 16, "~callbacks.ema")
    still = fit("on", 4, f"init={tmp_path / 'trained'}", "stage.optimizer.lr=0")
    assert_same_weights(still.state_dict(), load_stage(tmp_path / "trained", "raw").state_dict())


@pytest.mark.slow
def test_init_makes_a_new_class_layer_for_other_classes(fit, trained, tmp_path, capsys):
    """The other weights are those of the file; equal classes keep their layer."""
    trained("trained", 16)
    stored = load_stage(tmp_path / "trained").denoiser.state_dict()
    layer = "network.embed_class.weight"
    other = zip_of_classes(tmp_path / "other.zip", ["light", "dark"])
    three = zip_of_classes(tmp_path / "three.zip", ["dark", "light", "loud"])
    for number, (options, note) in enumerate([
        ([], ""),
        ([f"data.dataset.path={other}"], ", but a new class layer (other classes)"),
        ([f"data.dataset.path={three}", "network.num_classes=3"], ", but a new class layer (2 classes there, 3 here)"),
        (["network.num_classes=0"], ", but a new class layer (2 classes there, 0 here)"),
    ]):  # fmt: skip
        capsys.readouterr()
        still = fit(f"on-{number}", 4, f"init={tmp_path / 'trained'}", "stage.optimizer.lr=0", *options).denoiser
        assert f"trained/checkpoints/last.ckpt{note}, " in capsys.readouterr().out
        weights = still.state_dict()
        assert_same_weights(
            {name: weight for name, weight in weights.items() if name != layer},
            {name: weight for name, weight in stored.items() if name != layer},
        )
        if layer in weights and weights[layer].shape == stored[layer].shape:
            assert torch.equal(weights[layer], stored[layer]) == (not note)


@pytest.mark.slow
def test_init_refuses_weights_of_another_network(fit, trained, configuration, tmp_path):
    trained("trained", 4)
    path = tmp_path / "trained"
    for override, option in [
        ("network.channel_mult=[1,2]", r"network\.channel_mult=\[1\]"),
        ("augment=edm", r"augment=none"),
        ("data.dataset.channels=1", r"data\.dataset\.channels=3"),
    ]:
        with pytest.raises(UserError, match=rf"^init={path}: has another network; use {option}, or remove init$"):
            fit("on", 4, f"init={path}", override, "stage.optimizer.lr=0")
    both = r"use network\.channels=8 network\.blocks=1, or"
    with pytest.raises(UserError, match=both):
        fit("on", 4, f"init={path}", "network.channels=16", "network.blocks=2", "network.dropout=0.1")
    with pytest.raises(UserError, match="give one of them"):
        validate_training(configuration("train", "resume=conf", "init=conf"))
    with pytest.raises(UserError, match="init=nowhere"):
        validate_training(configuration("train", "init=nowhere"))
