"""Log to Weights & Biases, read back from offline runs."""

import csv
import json
import re
import shutil

import pytest
import torch
import wandb
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

from relay_diffusion.checkpoints.reading import wandb_record
from relay_diffusion.cli.errors import explain
from relay_diffusion.cli.main import TRAIN
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training import run as training
from relay_diffusion.training.loggers.wandb import PROJECT as DEFAULT_PROJECT
from relay_diffusion.training.loggers.wandb import WandbRun
from support import PROJECT
from wandb_files import of_type, records, rows_of

PANELS = {
    "train/loss", "train/gradient_norm", "train/replaced_gradients", "train/lr", "train/images_per_second",
    "train/tflops", "train/ema_half_life",
}  # fmt: skip
EVERY_8 = [f"callbacks.{name}.every_n_images=8" for name in ("log", "grid")]


@pytest.fixture
def fit(fit):
    """Train a network of one level, the smallest."""
    return lambda directory, images, *overrides, **stage: fit(
        directory, images, "network.channel_mult=[1]", *overrides, **stage
    )


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    """Keep the files of W&B out of the home directory."""
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))


def crash_at(monkeypatch, images):
    step = DiffusionStage.optimizer_step

    def failing(stage, *args, **kwargs):
        if stage.images_seen == images:
            raise RuntimeError("the power went")
        step(stage, *args, **kwargs)

    monkeypatch.setattr(DiffusionStage, "optimizer_step", failing)


@pytest.mark.slow
def test_a_crash_and_a_resume_are_one_run_without_repeated_rows(fit, tmp_path, monkeypatch):
    options = ["logger=wandb", "run_id=mine", *EVERY_8, "callbacks.checkpoints.every_n_images=16"]
    revision = {"commit": "1f2e", "uncommitted_changes": True}
    with monkeypatch.context() as patch:
        patch.setattr(training, "git_revision", lambda: revision)
        crash_at(patch, 28)
        with pytest.raises(RuntimeError, match="the power went"):
            fit("run", 40, *options)
    file, picture = tmp_path / "run/log/metrics.csv", tmp_path / "run/samples/images-000000024.png"
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["images_seen"] == 16
    assert file.read_text().splitlines()[-1].startswith("24,")  # so the row of 24 images comes again
    drawn = picture.stat().st_mtime_ns
    with file.open("a") as log:
        log.write("32,0.")  # cut short
    monkeypatch.setattr(training, "git_revision", dict)  # no checkout
    fit("run", 40, *options)
    parts = records(tmp_path / "run")

    (first,), (second,) = (of_type(part, "run") for part in parts)
    assert (first["run_id"], first["project"], first["resume"]) == ("mine", "relay-diffusion", True)
    assert second["run_id"] == "mine"
    for part, git in zip(parts, (revision, None), strict=True):
        assert {"name": "images_seen", "options": {"defined": True, "hidden": True}} in of_type(part, "metric")
        assert any(m.get("glob_name") == "*" and m["step_metric"] == "images_seen" for m in of_type(part, "metric"))
        config = of_type(part, "config")[0]["update"]
        assert (config["resolution"], config["data"]["batch_size"], config["stage"]["warmup_images"]) == (16, 4, 16)
        assert config["run_dir"] == str(tmp_path / "run")
        assert config.get("git") == git

    rows = rows_of(parts)
    assert [row["images_seen"] for row in rows] == [8, 16, 24, 32, 40]
    assert [row["_step"] for row in rows] == [8, 16, 24, 32, 40]
    for row in rows:
        assert row.keys() >= PANELS
        assert any(f"train/loss_noise_{k}" in row for k in (1, 2, 3, 4))
        assert row["samples/base.count"] == 1
    assert picture.stat().st_mtime_ns == drawn
    logged = list(csv.DictReader(file.read_text().splitlines()))
    assert [int(row["images_seen"]) for row in logged] == [8, 16, 24, 32, 40]
    for here, there in zip(logged, rows, strict=True):
        for key, text in here.items():
            assert float(text or "nan") == pytest.approx(there.get(key, float("nan")), nan_ok=True), key


def ids(run_dir):
    return [of_type(part, "run")[0]["run_id"] for part in records(run_dir)]


def stored(run_dir):
    return torch.load(run_dir / "checkpoints/last.ckpt", weights_only=True)["run"]["wandb"]


def record(run_id, directory):
    return {"id": run_id, "directory": str(directory), "project": "relay-diffusion"}


@pytest.mark.slow
def test_which_wandb_run_a_directory_continues(fit, tmp_path):
    """Without run_id, whose default differs at each start."""
    fit("run", 4, "logger=wandb")
    (original,) = ids(tmp_path / "run")
    assert stored(tmp_path / "run") == record(original, tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    fit("moved", 8, "logger=wandb")
    (tmp_path / "moved/wandb_run.json").unlink()
    fit("moved", 12, "logger=wandb")  # the checkpoint has it too
    assert ids(tmp_path / "moved") == [original] * 3
    assert stored(tmp_path / "moved") == record(original, tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copy", ignore=shutil.ignore_patterns("wandb"))
    fit("copy", 16, "logger=wandb")
    fit("copy", 20, "logger=wandb")
    (copied,) = set(ids(tmp_path / "copy"))
    fit("other", 16, "logger=wandb", f"resume={tmp_path / 'moved'}")
    (resumed,) = ids(tmp_path / "other")
    assert len({original, copied, resumed}) == 3


@pytest.mark.parametrize("content", ["{", "[1]", '{"id": 1}', "{}", '{"id": "x"}'])
def test_errors_name_a_damaged_wandb_record(tmp_path, content):
    (tmp_path / "wandb_run.json").write_text(content)
    with pytest.raises(UserError, match=r"wandb_run\.json cannot be read: delete it for a new W&B run"):
        WandbRun("project", "mine", tmp_path).continue_run()


@pytest.mark.parametrize(("run_id", "valid"), [("mine", True), ("a/b", False), ("a*[1]", False), ("x" * 200, False)])
def test_wandb_gets_a_valid_id(tmp_path, run_id, valid):
    version = WandbRun("project", run_id, tmp_path).version
    assert (version == run_id) is valid
    assert re.fullmatch(r"[\w.-]{1,64}", version)
    assert version != WandbRun("project", f"{run_id}?", tmp_path).version


@pytest.mark.usefixtures("_fresh_wandb")
def test_a_refused_key_is_an_error_with_a_remedy(fit, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    with pytest.raises(UserError, match=r"^W&B: WANDB_API_KEY invalid: .*: use logger\.wandb\.offline=true"):
        fit("run", 4, "logger=wandb")
    assert not (tmp_path / "run/checkpoints").exists()


OPTIONS = {"project": "p", "entity": "team", "name": "first try", "group": 5, "tags": ["a", "b c"]}


@pytest.fixture
def _fresh_wandb():
    """Make W&B read the environment anew, before and after a test."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.usefixtures("_fresh_wandb")
def test_the_record_of_a_run_has_the_place_that_wandb_chooses(tmp_path, monkeypatch):
    """In a sweep, W&B takes project and entity of the sweep."""
    for name, value in {"SWEEP_ID": "sweep", "RUN_ID": "mine", "PROJECT": "theirs", "ENTITY": "team"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    run = WandbRun("p", "mine", tmp_path)
    run.log_metrics({"train/loss": 1.0}, 8)
    run.finalize("success")
    expected = {"id": "mine", "directory": str(tmp_path), "project": "theirs", "entity": "team"}
    assert json.loads((tmp_path / "wandb_run.json").read_text()) == expected
    assert run.run_record == expected


def test_the_options_of_a_run_are_those_of_wandb(tmp_path):
    run = WandbRun(run_id="mine", directory=tmp_path, **OPTIONS)
    run.log_metrics({"train/loss": 1.0}, 8)
    run.finalize("success")
    (sent,) = of_type(records(tmp_path)[0], "run")
    found = (sent["project"], sent["entity"], sent["display_name"], sent["run_group"], sent["tags"])
    assert found == ("p", "team", "first try", "5", ["a", "b c"])


@pytest.mark.parametrize(
    ("option", "value"),
    [("project", "a/b"), ("project", ""), ("entity", "a:b"), ("name", "x" * 129), ("group", ""), ("tags", [""]),
     ("tags", ["x" * 65])],
)  # fmt: skip
def test_names_that_wandb_refuses_are_errors(tmp_path, option, value):
    with pytest.raises(ValueError, match=rf"^{option}=.*: (must|each tag must) "):
        WandbRun(run_id="mine", directory=tmp_path, **OPTIONS | {option: value})


def test_the_error_of_a_wrong_name_names_the_option(configuration, tmp_path):
    cfg = configuration("train", "logger=wandb", "logger.wandb.project=a/b", f"run_dir={tmp_path}")
    with pytest.raises(InstantiationException) as raised:
        instantiate(cfg.logger)
    assert explain(raised.value, TRAIN) == "logger.wandb.project=a/b: must not contain /; use another name"


@pytest.mark.slow
def test_the_best_and_the_last_checkpoint_are_versions_of_one_artifact(fit, tmp_path):
    best = ["callbacks.checkpoints.best=train/lr", "callbacks.checkpoints.best_mode=max"]  # it rises in the warm-up
    fit("run", 16, "logger=wandb", "run_id=mine", *EVERY_8, *best, "callbacks.checkpoints.upload=true")
    artifacts = of_type(records(tmp_path / "run")[0], "artifact")
    assert {artifact["name"] for artifact in artifacts} == {"mine"}
    assert [(a["manifest"]["contents"][0]["path"], sorted(a["aliases"])) for a in artifacts] == [
        ("best.ckpt", ["best", "images-8", "latest"]),
        ("last.ckpt", ["images-16", "last", "latest"]),
        ("best.ckpt", ["best", "images-16", "latest"]),
    ]


@pytest.mark.slow
def test_pictures_of_a_relay_stage_and_checkpoints_on_request(fit, tmp_path):
    relay = ["stage.corruption.block=2", "logger=wandb", "run_id=mine", *EVERY_8]
    fit("run", 8, *relay, "callbacks.checkpoints.upload=true", stage="relay")
    (part,) = records(tmp_path / "run")
    (row,) = rows_of([part])
    assert row["samples/relay.width"] > 2 * row["samples/relay.height"]  # start, output and real images
    (artifact,) = of_type(part, "artifact")
    assert (artifact["name"], artifact["type"], sorted(artifact["aliases"])) == (
        "mine",
        "model",
        ["images-8", "last", "latest"],
    )
    (content,) = artifact["manifest"]["contents"]
    assert (content["path"], int(content["size"])) == (
        "last.ckpt",
        (tmp_path / "run/checkpoints/last.ckpt").stat().st_size,
    )
    assert json.loads(artifact["metadata"]) == {"images_seen": 8}
    fit("other", 8, "logger=wandb", *EVERY_8)
    assert of_type(records(tmp_path / "other")[0], "artifact") == []


@pytest.mark.parametrize("record", [None, "a", {}, {"id": "a"}, {"id": "a", "directory": 1}, {"id": "a", 2: "b"}])
def test_a_checkpoint_with_another_record_has_no_run(record):
    """A checkpoint may be somebody else's."""
    assert wandb_record({"run": {"wandb": record}}) is None
    assert wandb_record({"run": {"wandb": {"id": "a", "directory": "b"}}}) == {"id": "a", "directory": "b"}


def test_the_default_project_is_that_of_the_configuration():
    assert OmegaConf.load(PROJECT / "conf/logger/wandb.yaml").wandb.project == DEFAULT_PROJECT
