"""Log the results of sampling to the W&B run of the training, or to TensorBoard."""

import json

import pytest
import torch
import wandb
from hydra.utils import instantiate
from PIL import Image

from fake_inception import use_small_features
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.errors import UserError
from relay_diffusion.sampling import tracking
from relay_diffusion.sampling.run import sample
from relay_diffusion.training.loggers.wandb import WandbRun
from relay_diffusion.utils.run_lock import run_lock
from wandb_files import files_of, of_type, records, rows_of


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory, monkeypatch):
    """Keep the files of W&B out of the home directory."""
    folder = tmp_path_factory.mktemp("wandb")
    for name in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(folder / name))


@pytest.fixture(scope="session")
def tracked_runs(train_stage, tmp_path_factory):
    """A relay 8 -> 16, whose stages were trained with W&B."""
    root = tmp_path_factory.mktemp("tracked")
    options = {"base": ["resolution=8"], "relay": ["resolution=16", "stage.corruption.block=2"]}
    for name, words in options.items():
        train_stage(root / name, f"stage={name}", *words, "logger=wandb", f"run_id=train-{name}")
    return root


@pytest.fixture
def evaluate(configuration, small_zip, tmp_path, monkeypatch):
    """Sample and evaluate a relay with pixels as features; returns the results."""
    use_small_features(monkeypatch)

    def run(runs, *overrides, output="out"):
        cfg = configuration(
            "sample", "relay=two_stages", *(f"relay.stages.{name}.path={runs / name}" for name in ("base", "relay")),
            f"reference={small_zip}", f"metrics.reference.cache={tmp_path / 'reference'}", "trainer.accelerator=cpu",
            "metrics.evaluator.inception._target_=pixel_inception.pixels", "seeds=0-3", "mode=evaluate", "run_id=mine",
            f"output={tmp_path / output}", *overrides,
        )  # fmt: skip
        validate_sampling(cfg)
        return sample(cfg)

    return run


@pytest.mark.slow
def test_results_go_to_the_run_that_trained_the_last_stage(tracked_runs, evaluate, tmp_path, capsys):
    results = evaluate(tracked_runs, "logger=wandb")
    assert "the results go to the W&B run train-relay, which trained relay" in capsys.readouterr().out
    (part,) = records(tmp_path / "out")
    (run,) = of_type(part, "run")
    assert (run["run_id"], run["project"], run.get("display_name", "")) == ("train-relay", "relay-diffusion", "")
    (row,) = rows_of([part])
    assert (row["images_seen"], row["_step"]) == (8, 9)  # after the row of training
    assert row["relay/fid"] == results["fid"]
    assert (row["relay/images"], row["relay/picture.count"], row["relay/samples.nrows"]) == (4, 1, 4)
    files = files_of(part, "run_table")
    table = json.loads(files["relay/samples.table.json"].read_text())
    with Image.open(files[table["data"][0][0]["path"]]) as image:
        assert image.size == (16, 16)
    assert table["columns"] == ["image", "name", "seed", "class"]
    assert [cells[1:] for cells in table["data"]] == [
        [f"00000000/seed0000000{seed}", seed, ("dark", "light")[seed % 2]] for seed in range(4)
    ]
    evaluation = next(a for a in of_type(part, "artifact") if a["type"] == "evaluation")
    assert evaluation["name"] == "train-relay-evaluation"
    assert evaluation["manifest"]["contents"][0]["path"] == "metrics.json"
    project = "relay-diffusion"
    assert json.loads(evaluation["metadata"]) == {
        "images_seen": 8,
        "models": {name: f"{project}/train-{name}:images-8" for name in ("base", "relay")},
    }
    assert of_type(part, "config") == []  # the settings of training stay


@pytest.mark.slow
def test_a_repeated_command_logs_nothing_again(tracked_runs, evaluate, tmp_path):
    evaluate(tracked_runs, "logger=wandb")
    evaluate(tracked_runs, "logger=wandb")
    assert len(records(tmp_path / "out")) == 1
    evaluate(tracked_runs, "logger=wandb", "seeds=0-4")
    assert [row["relay/images"] for row in rows_of(records(tmp_path / "out"))] == [4, 5]


@pytest.mark.slow
def test_each_logger_gets_the_results_once(relay_runs, evaluate, tmp_path, capsys):
    pytest.importorskip("tensorboard")
    evaluate(relay_runs, "logger=tensorboard")
    evaluate(relay_runs, "logger=wandb")
    (row,) = rows_of(records(tmp_path / "out"))
    assert row["relay/images"] == 4
    assert "logged already" not in capsys.readouterr().out
    for name in ("tensorboard.TensorBoardRun", "wandb.WandbRun"):
        kind, _, logger = name.partition(".")
        evaluate(relay_runs, f"logger={kind}")
        assert f"note: logged already: {logger} (delete " in capsys.readouterr().out
    assert len(records(tmp_path / "out")) == 1


@pytest.mark.slow
def test_a_command_that_was_killed_logs_the_evaluation_when_repeated(relay_runs, evaluate, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(WandbRun, "log_evaluation", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(relay_runs, "logger=wandb")
    wandb.teardown()  # ends the run that the error left
    evaluate(relay_runs, "logger=wandb")
    artifacts = [a["type"] for part in records(tmp_path / "out") for a in of_type(part, "artifact")]
    assert artifacts.count("evaluation") == 1


def test_a_damaged_list_of_what_was_logged_is_an_error(tmp_path):
    (tmp_path / "logged.json").write_text("[")
    with pytest.raises(UserError, match=r"logged\.json cannot be read: delete it to log the results again"):
        tracking._read_logged(tmp_path / "logged.json")


def test_without_a_run_of_the_training_the_results_get_one(relay_runs, evaluate, tmp_path, capsys):
    evaluate(relay_runs, "logger=wandb", "logger.wandb.tags=[a]", "mode=sample")
    assert "note: relay has no W&B run: the results go to the new run mine" in capsys.readouterr().out
    (part,) = records(tmp_path / "out")
    (run,) = of_type(part, "run")
    assert (run["run_id"], run["display_name"], run["tags"]) == ("mine", "mine", ["a"])
    assert of_type(part, "config")[0]["update"]["seeds"] == "0-3"
    (row,) = rows_of([part])
    assert (row["images_seen"], row["relay/images"]) == (8, 4)


def test_existing_images_get_a_run_of_their_own(relay_runs, evaluate, small_zip, tmp_path):
    unused = ["seeds=null", f"images={small_zip}"]
    results = evaluate(relay_runs, "logger=wandb", *unused)
    (row,) = rows_of(records(tmp_path / "out"))
    assert (row["images_seen"], row["relay/images"], row["relay/fid"]) == (0, 24, results["fid"])


@pytest.mark.slow
def test_nothing_is_logged_to_a_run_that_is_training(tracked_runs, evaluate, tmp_path, capsys):
    with run_lock(tracked_runs / "relay", "run_dir"):
        evaluate(tracked_runs, "logger=wandb")
    assert "note: nothing is logged, as " in capsys.readouterr().out
    assert records(tmp_path / "out") == []
    evaluate(tracked_runs, "logger=wandb")
    assert len(records(tmp_path / "out")) == 1


@pytest.mark.slow
def test_a_damaged_record_is_no_run(tracked_runs, evaluate, tmp_path, capsys):
    damaged = tmp_path / "runs"
    for name in ("base", "relay"):
        content = torch.load(tracked_runs / name / "checkpoints/last.ckpt", weights_only=True)
        content["run"]["wandb"] = {"id": 3}
        (damaged / name).mkdir(parents=True)
        torch.save(content, damaged / name / "last.ckpt")
    evaluate(damaged, "logger=wandb", "mode=sample")
    assert "note: relay has no W&B run" in capsys.readouterr().out


@pytest.mark.slow
def test_tensorboard_gets_the_same(tracked_runs, evaluate, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    results = evaluate(tracked_runs, "logger=tensorboard")
    evaluate(tracked_runs, "logger=tensorboard")
    found = EventAccumulator(str(tmp_path / "out/tensorboard")).Reload()
    (fid,) = found.Scalars("relay/fid")
    assert (fid.step, fid.value) == (8, pytest.approx(results["fid"]))
    assert found.Tags()["images"] == ["relay/picture", *(f"relay/samples/{row}_image" for row in range(4))]


@pytest.fixture
def _malformed_key(monkeypatch):
    """Give W&B a key that it refuses without asking the server."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    wandb.teardown()  # it reads the environment anew
    yield
    wandb.teardown()


REMEDY = "use logger.wandb.offline=true"


@pytest.mark.usefixtures("_malformed_key")
def test_a_refused_key_is_an_error_before_sampling(relay_runs, evaluate, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=f"^W&B: WANDB_API_KEY invalid: .*: {REMEDY}"):
        evaluate(relay_runs, "logger=wandb")
    assert not (tmp_path / "out").exists()
    WandbRun("p", "mine", tmp_path, offline=True).check_login()
    monkeypatch.setenv("WANDB_MODE", "offline")
    WandbRun("p", "mine", tmp_path).check_login()


def test_the_results_are_printed_before_wandb_fails(relay_runs, evaluate, tmp_path, small_zip, monkeypatch, capsys):
    def init(**_):
        raise wandb.Error("no\nserver")

    monkeypatch.setattr(wandb, "init", init)
    for where in ([], ["seeds=null", f"images={small_zip}", f"output={tmp_path / 'existing'}"]):
        with pytest.raises(UserError, match=f"^W&B: no server: {REMEDY}"):
            evaluate(relay_runs, "logger=wandb", *where)
        assert "FID" in capsys.readouterr().out


NAMED = {"name": "new", "group": "g", "tags": ["a"]}


def test_the_name_of_the_training_run_stays(tmp_path, capsys):
    run = WandbRun("other", "mine", tmp_path, offline=True, entity="me", **NAMED)
    run.join({"id": "b", "directory": "", "project": "p", "entity": "team"})
    assert capsys.readouterr().out == (
        "note: not used, as the W&B run b has its own: logger.wandb.name=new, logger.wandb.group=g, "
        "logger.wandb.tags=['a'], logger.wandb.project=other, logger.wandb.entity=me\n"
    )
    run.log_metrics({"relay/fid": 1.0}, 8)
    run.finalize("success")
    (sent,) = of_type(records(tmp_path)[0], "run")
    assert (sent["run_id"], sent["project"], sent["entity"]) == ("b", "p", "team")
    assert [sent.get(key) for key in ("display_name", "run_group", "tags")] == [None] * 3


def test_default_options_give_no_note(configuration, tmp_path, capsys):
    cfg = configuration("sample", "logger=wandb", f"run_dir={tmp_path}")
    run = instantiate(cfg.logger.wandb)
    run.join({"id": "b", "directory": "", "project": "p", "entity": "team"})
    assert capsys.readouterr().out == ""


class OnlineRun:
    """Stands for a run with a network: it records which artifacts are used and logged."""

    offline, id, step = False, "online", 1000

    def __init__(self, missing=()):
        self.used, self.logged, self.rows, self.missing = [], [], [], missing

    def use_artifact(self, name, type):
        if name in self.missing:
            raise ValueError(f"artifact {name} not found")
        self.used.append((name, type))

    def log_artifact(self, artifact):
        self.logged.append(artifact)

    def log(self, row, step):
        self.rows.append((row, step))


def test_an_evaluation_has_the_models_as_inputs(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text("{}")
    run = WandbRun("p", "mine", tmp_path)
    run.join({"id": "b", "directory": "", "project": "p", "entity": "team"})
    run._experiment = OnlineRun(missing=["p/a:images-8"])
    models = {"base": ({"id": "a"}, 8), "relay": ({"id": "b", "project": "p", "entity": "team"}, 16)}
    run.log_evaluation(tmp_path / "metrics.json", models, 16)
    assert run._experiment.used == [("team/p/b:images-16", "model")]
    assert [artifact.name for artifact in run._experiment.logged] == ["b-evaluation"]
    assert capsys.readouterr().out == (
        "note: W&B has no artifact p/a:images-8, so metrics.json has no link to base: train with "
        "callbacks.checkpoints.upload=true\n"
    )
    run.log_metrics({"relay/fid": 1.0}, 16)
    assert run._experiment.rows == [({"relay/fid": 1.0, "images_seen": 16}, 1000)]  # after the last row of the run
