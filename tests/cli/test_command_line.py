"""User errors print one line, exit with 2, and write nothing."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from hydra._internal.utils import get_args_parser
from PIL import Image

from relay_diffusion.cli.main import FLAGS, _check_flags
from relay_diffusion.errors import UserError
from support import PROJECT, TINY, run


def assert_one_line(result, *parts):
    assert result.returncode == 2, result.stdout + result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert part in lines[0]


def test_a_run_writes_config_log_checkpoint_and_pictures(relay_runs):
    grid = 4 * 128 + 3 * 2  # four images in a row, each shown at 128x128
    for name, width in (("base", grid), ("relay", 3 * grid + 2 * 12)):
        run_dir = relay_runs / name
        assert (run_dir / "config.yaml").exists()
        assert (run_dir / "log/metrics.csv").exists()
        with Image.open(run_dir / "samples/images-000000008.png") as picture:
            assert picture.width == width
        assert not list(run_dir.rglob(".*"))  # no temporary files


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trainer.max_imagess=5"], ["trainer.max_imagess is not an option", "did you mean trainer.max_images?"]),
        (["trainer.lr=5"], ["did you mean stage.optimizer.lr?"]),
        (["experiment=quickstart_bas"], ["experiment=quickstart_bas", "did you mean quickstart_base?"]),
        (["data=folder"], ["data.dataset.path has no value"]),
        (["data.dataset.path=nowhere.zip"], ["data.dataset.path=nowhere.zip: no such file"]),
        (["data.batch_size=7", "trainer.devices=2"], ["data.batch_size=7", "devices x nodes = 2"]),
        (["trainer.max_images=[1"], ["[1"]),
        (["-m", "seed=1,2"], ["run_dir=", "jobs of the sweep would share it"]),
        (["+network.foo=1"], ["foo"]),
        (["+foo=1"], ["foo is not an option"]),
        (["relay=emoji"], ["relay is not an option of train.py; its groups are augment, callbacks"]),
        (
            ["stage/corruption=linear"],
            ["stage/corruption=linear: the chosen stage has no group stage/corruption", "choose another stage"],
        ),
        (
            ["+relay=emoji"],
            ["relay is not an option of train.py; its groups are augment, callbacks"],
        ),
        (["++metrics=fid"], ["metrics=fid", "--help lists the groups"]),
        (["seed=0,1"], ["seed=0,1: holds several values", '"seed=[0,1]"', "add --multirun"]),
        (["run_id=${resolutoin}"], ["run_id=${resolutoin}: resolutoin is not an option; --help lists the options"]),
        (["--config-name=nowhere"], ["--config-name=nowhere: there is no such yaml file; remove it"]),
        (["experiment=emoji_64,own_64"], ["experiment=emoji_64,own_64: is a list of choices; give one"]),
        (["stage.corruption.schedule.p_std=a"], ["stage.corruption.schedule"]),
    ],
)
def test_mistakes_in_training_options(arguments, parts, tmp_path):
    result = run("train.py", *arguments, f"run_dir={tmp_path / 'run'}")
    assert_one_line(result, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("script", "asked", "option", "instead"),
    [
        ("train.py", ["strategy=ddp", "trainer.devices=2"], "strategy=ddp", "strategy=ddp_cpu"),
        ("sample.py", ["trainer.accelerator=cuda"], "trainer.accelerator=cuda", "trainer.accelerator=cpu"),
    ],
)
def test_missing_gpus_are_reported(script, asked, option, instead, tmp_path):
    result = run(script, *asked, f"run_dir={tmp_path / 'run'}", CUDA_VISIBLE_DEVICES="")
    assert_one_line(result, f"error: {option} needs GPUs, and this host has none: use {instead}, or leave it out")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_a_run_id_that_leaves_the_outputs(script):
    result = run(script, "run_id=../../elsewhere")
    assert_one_line(result, "error: run_id='../../elsewhere': must be the name of one directory")


@pytest.mark.parametrize(
    ("script", "said", "groups"),
    [
        (
            "train.py stage=relay --help",
            "python train.py experiment=quickstart_base",
            [
                "augment",
                "callbacks",
                "data",
                "experiment",
                "logger",
                "network",
                "optimizer",
                "sampler",
                "stage",
                "stage/corruption",
                "strategy",
                "text",
                "trainer",
            ],
        ),
        (
            "sample.py",  # without arguments it prints the help
            "python sample.py relay=emoji",
            [
                "logger",
                "metrics",
                "relay",
                "sampler@relay.stages.base.sampler",
                "sampler@relay.stages.relay.sampler",
                "strategy",
                "trainer",
            ],
        ),
    ],
)
def test_help_lists_the_groups_that_the_script_accepts(script, said, groups):
    result = run(script)
    assert result.returncode == 0, result.stderr
    assert said in result.stdout
    listed = result.stdout.partition("Groups (GROUP=CHOICE)")[2].partition("Common overrides")[0]
    lines = [line.partition(": ") for line in listed.splitlines()[1:] if line]
    assert [group for group, _, _ in lines] == groups
    for group, _, choices in lines:
        files = sorted(path.stem for path in (PROJECT / "conf" / group.partition("@")[0]).glob("*.yaml"))
        assert choices.split(", ") == files


TORCHRUN = "-m torch.distributed.run --nproc-per-node=2"


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train.py", ["trainer.max_images=0"]),  # found by the checks of the settings
        ("train.py", ["data.dataset.path=corrupt.zip"]),  # found when the run is built
        ("train.py", ["data.dataset.path=corrupt.zip", "run_dir=mine/a/b"]),
        ("sample.py", ["relay=one_stage", "relay.stages.base.path=corrupt.zip"]),
        pytest.param(
            TORCHRUN,
            [f"{PROJECT}/train.py", "data.dataset.path=corrupt.zip", "strategy=ddp_cpu"],
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_failed_command_leaves_no_directories(script, arguments, tmp_path, small_zip):
    (tmp_path / "corrupt.zip").write_bytes(small_zip.read_bytes()[:3000])
    (tmp_path / "mine").mkdir()
    result = run(script if script == TORCHRUN else f"{PROJECT / script}", *arguments, cwd=tmp_path)
    assert result.returncode != 0
    assert "error: " in result.stderr
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == ["corrupt.zip", "mine"]


def test_the_commands_are_those_modules_that_run_something():
    commands = (
        "cli.app",
        "cli.convert_checkpoint",
        "cli.convert_images",
        "cli.neighbours",
        "cli.publish",
        "cli.spectrum",
    )
    package = PROJECT / "src/relay_diffusion"
    runnable = [path for path in package.rglob("*.py") if 'if __name__ == "__main__":' in path.read_text()]
    assert sorted(commands) == sorted(".".join(path.relative_to(package).with_suffix("").parts) for path in runnable)
    for command in commands:
        assert run(f"-m relay_diffusion.{command}", "--help").returncode == 0


@pytest.mark.slow
def test_data_that_cannot_be_used(tmp_path, small_zip):
    corrupt = tmp_path / "corrupt.zip"
    corrupt.write_bytes(small_zip.read_bytes()[:3000])
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    Image.new("RGB", (24, 16)).save(folder / "b.png")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:40])
    for arguments, parts in [
        ([f"data.dataset.path={corrupt}"], ["corrupt.zip"]),
        ([f"data.dataset.path={small_zip}", "resolution=32"], ["train/000.png", "16x16"]),
        ([f"data.dataset.path={folder}", "network.num_classes=0", "data.batch_size=6"], [".png", str(folder)]),
        (
            [f"data.dataset.path={folder}"],
            ["0 classes: use network.num_classes=0", "relay_diffusion.cli.convert_images"],
        ),
        ([f"data.dataset.path={small_zip}", "network.num_classes=3"], ["2 classes: use network.num_classes=2"]),
        (
            [f"data.dataset.path={small_zip}", f"resume={corrupt}"],
            ["error: resume: ", "cannot be read as a checkpoint"],
        ),
        ([f"data.dataset.path={small_zip}", f"init={corrupt}"], ["error: init: ", "cannot be read as a checkpoint"]),
    ]:
        options = [*TINY, "data.dataset.subset=''", "resolution=16", *arguments, f"run_dir={tmp_path / 'run'}"]
        assert_one_line(run("train.py", *options), *parts)
        assert not (tmp_path / "run/checkpoints").exists()


def test_bad_images_in_worker_processes_are_named_too(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.new("RGB", (16, 16)).save(folder / "a.png")
    (folder / "c.png").write_bytes((folder / "a.png").read_bytes()[:40])
    options = [*TINY, "network.num_classes=0", "data.num_workers=1", "data.dataset.subset=''", "resolution=16"]
    result = run("train.py", *options, f"data.dataset.path={folder}", f"run_dir={tmp_path / 'run'}")
    assert_one_line(result, "c.png")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["relay=quickstrt"], ["did you mean quickstart?"]),
        (["relay=two_stages"], ["relay.stages.base.path has no value"]),
        (["relay=quickstart", "relay.stages.base.path=nowhere"], ["relay.stages.base.path=nowhere"]),
        (["network=tiny"], ["network is not an option of sample.py; its groups are logger, metrics, relay"]),
        (["relay=emoji", "sampler=edm"], ["sampler=edm: name the stage, as sampler@relay.stages.base.sampler=edm"]),
        (
            ["relay=one_stage", "sampler@relay.stages.relay.sampler=edm"],
            ["the chosen relay has no group sampler@relay.stages.relay.sampler"],
        ),
        (["relay=emoji", "seeds=0,0"], ["seeds=0,0: holds several values", '"seeds=[0,0]" for a list']),
        (
            ["+network=tiny"],
            ["network is not an option of sample.py; its groups are logger, metrics, relay, strategy"],
        ),
        (["relay=quickstart", "seedz=3"], ["seedz is not an option", "did you mean seeds?"]),
    ],
)
def test_mistakes_in_sampling_options(arguments, parts, tmp_path, small_zip):
    paths = [] if "relay=quickstart" not in arguments else [f"relay.stages.relay.path={small_zip}"]
    assert_one_line(run("sample.py", *arguments, *paths, f"run_dir={tmp_path / 'run'}"), *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_mistakes_that_need_the_checkpoints(relay_overrides, relay_runs, tmp_path):
    text = tmp_path / "text.ckpt"
    text.write_text("hello")
    for arguments, parts in [
        ([f"relay.stages.relay.path={relay_runs / 'base'}"], ["relay.stages.relay starts from noise"]),
        (
            [f"relay.stages.base.path={text}"],
            ["error: relay.stages.base: ", "text.ckpt cannot be read as a checkpoint"],
        ),
        (["class=green"], ["class=green", "dark, light"]),
        (["seeds=9-1"], ["seeds: the range 9-1 descends"]),
        (["mode=evaluate", f"metrics.evaluator.inception.weights={text}"], ["text.ckpt"]),
        (["mode=evaluate", "metrics.evaluator.inception.weights=nowhere.pth"], ["nowhere.pth"]),
    ]:
        assert_one_line(run("sample.py", *relay_overrides, *arguments), *parts)
        assert not (tmp_path / "samples/images").exists()


def test_a_directory_that_cannot_be_made_is_one_line():
    result = run("sample.py", "relay=emoji", "output=/proc/samples")
    assert_one_line(result, "output=/proc/samples: cannot be created or locked", "choose another output")


@pytest.mark.slow
def test_help_to_a_closed_pipe():
    """A closed pipe, as in `--help | head`, prints no error."""
    nobody, pipe = os.pipe()
    os.close(nobody)
    command = [sys.executable, PROJECT / "train.py", "--help"]
    ended = subprocess.run(command, stdout=pipe, stderr=subprocess.PIPE, text=True, check=False)
    os.close(pipe)
    assert ended.stderr == ""
    assert ended.returncode == 128 + signal.SIGPIPE


@pytest.mark.parametrize(
    ("words", "written"),
    [
        (
            ["--experiment", "quickstart_base"],
            "experiment=quickstart_base",
        ),  # argparse reads it as --experimental-rerun
        (["relay=emoji", "--seeds=0-7", "prompt=cat"], "seeds=0-7"),
        (["--seeds", "prompt=cat"], "seeds=VALUE"),
        (["--seeds", "--npz"], "seeds=VALUE"),
    ],
)
def test_options_written_as_flags(words, written):
    with pytest.raises(UserError, match=f": options are KEY=VALUE, without dashes; write {written} "):
        _check_flags(words)


def test_an_unknown_flag_is_one_line():
    assert_one_line(run("train.py", "--batch", "7"), "--batch: options are KEY=VALUE", "write batch=7")


def test_the_flags_are_those_of_hydra():
    assert {flag for flag in get_args_parser()._option_string_actions if flag.startswith("--")} == FLAGS
    _check_flags([*FLAGS, "-m", "seed=1", "--cfg=job"])


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_the_version_is_that_of_this_package(script):
    result = run(script, "--version")
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert line.startswith("relay-diffusion 0.")
    for name in ("hydra 1.", "torch 2.", "lightning 2."):
        assert name in line


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_help_imports_no_large_library(script):
    """`--version` ends before."""
    large = ["torch", "lightning", "wandb", "transformers", "datasets", "diffusers", "gradio", "optuna", "tensorboard"]
    code = f"import runpy, sys; sys.argv = ['{script}', '--help']; runpy.run_path('{script}', run_name='__main__')"
    code = f"import atexit, sys; atexit.register(lambda: print([m for m in {large} if m in sys.modules])); {code}"
    result = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_hydra_full_error_shows_the_traceback():
    result = run("train.py", "data.dataset.path=nowhere.zip", HYDRA_FULL_ERROR="1")
    assert result.returncode != 0
    assert "Traceback" in result.stderr


@pytest.mark.slow
def test_offline_wandb_needs_no_account(tmp_path, small_zip):
    result = run(
        "train.py", *TINY, "logger=wandb", "resolution=16", f"data.dataset.path={small_zip}", "trainer.max_images=8",
        f"run_dir={tmp_path / 'run'}", "callbacks.grid.every_n_images=8",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["images_seen"] == 8


@pytest.mark.parametrize(
    ("script", "arguments", "words"),
    [
        ("train.py", ["run_dir={file}"], ["run_dir={file}", "{file} is a file: choose another directory"]),
        ("train.py", ["run_dir={file}/run"], ["run_dir={file}", "{file} is a file: choose another directory"]),
        ("sample.py", ["output={file}"], ["output={file}", "{file} is a file: choose another directory"]),
        ("sample.py", ["output={new}", "seeds=0-999999999999"], ["seeds=0-999999999999", "at most 10,000,000"]),
    ],
)
def test_hostile_options_are_one_line(tmp_path, script, arguments, words):
    places = {"file": str(tmp_path / "file"), "new": str(tmp_path / "new")}
    (tmp_path / "file").write_text("mine")
    paths = [f"relay.stages.{name}.path={PROJECT / 'conf'}" for name in ("base", "relay")]
    result = run(script, *(a.format(**places) for a in arguments), *(paths if script == "sample.py" else []))
    assert result.returncode == 2, result.stderr
    assert len(result.stderr.splitlines()) == 1
    for word in words:
        assert word.format(**places) in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "mine"
