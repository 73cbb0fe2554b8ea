"""Compose and build every config; reject invalid values before building."""

import copy
import os
import shutil
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from relay_diffusion.config.checks import world_size
from relay_diffusion.config.run_dir import _new_run_id, _run_dir
from relay_diffusion.config.sample import validate_sampling
from relay_diffusion.config.train import validate_training
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.options import chosen_stages, reference_of, sampling_options
from relay_diffusion.sampling.run import build_evaluator
from relay_diffusion.training.run import train
from relay_diffusion.utils.distributed import RUN_ID
from support import PROJECT, TINY


def choices(group):
    return sorted(path.stem for path in (PROJECT / "conf" / group).glob("*.yaml"))


EXPERIMENTS = choices("experiment")


@pytest.mark.parametrize("network", choices("network"))
@pytest.mark.parametrize("stage", choices("stage"))
def test_every_stage_with_every_network(configuration, network, stage):
    options = [f"network={network}", f"stage={stage}", "resolution=128", "trainer.accelerator=cpu"]
    validate_training(configuration("train", *options))  # with the number of classes of the data
    cfg = configuration("train", *options, "network.num_classes=3")
    validate_training(cfg)
    with torch.device("meta"):
        built = instantiate(cfg.stage, _convert_="all")
    assert built.resolution == 128


@pytest.mark.parametrize("stage", choices("stage"))
def test_the_schedule_of_every_stage_can_be_set(configuration, stage):
    overrides = [f"stage.corruption.schedule.{key}" for key in ("p_mean=0.5", "p_std=1.5")]
    schedule = instantiate(configuration("train", f"stage={stage}", *overrides).stage.corruption.schedule)
    assert (schedule.p_mean, schedule.p_std) == (0.5, 1.5)
    written = instantiate(configuration("train", f"stage={stage}").stage.corruption.schedule)
    default = type(written)()  # of older runs, whose config does not have them
    assert (written.p_mean, written.p_std) == (default.p_mean, default.p_std)


@pytest.mark.parametrize("sampler", ["blurring", "multistep_relay"])
@pytest.mark.parametrize("corruption", choices("stage/corruption"))
def test_every_corruption_of_a_relay_stage_with_both_samplers(configuration, small_zip, corruption, sampler):
    chosen = ["stage=relay", f"stage/corruption={corruption}", f"sampler={sampler}"]
    values = ["resolution=16", "stage.corruption.block=2", "stage.corruption.block_strength=0"]
    cfg = configuration("train", *TINY, *chosen, *values, f"data.dataset.path={small_zip}")
    validate_training(cfg)
    with torch.device("meta"):
        stage = instantiate(cfg.stage, _convert_="all")
    for part in (stage.corruption, stage.sampler.corruption):
        assert type(part).__name__ == f"{corruption.title()}Corruption"
        assert (part.block, part.block_strength) == (2, 0)


def test_an_option_of_another_corruption_is_named(configuration, small_zip):
    linear = ["stage=relay", "stage/corruption=linear", "+stage.corruption.min_gain=0.1", "resolution=16"]
    message = r"stage\.corruption\.min_gain=0\.1: _target_=relay_diffusion\.diffusion\.LinearCorruption has no such"
    with pytest.raises(UserError, match=message):
        validate_training(configuration("train", *TINY, *linear, f"data.dataset.path={small_zip}"))


@pytest.mark.slow
@pytest.mark.parametrize("group", ["data", "trainer", "strategy", "callbacks", "logger", "metrics", "relay", "augment"])
def test_every_choice_of_the_other_groups(configuration, small_zip, tmp_path, group):
    name = "sample" if group in ("metrics", "relay") else "train"
    for choice in choices(group):
        if (group, choice) == ("trainer", "sampling"):
            continue  # of sample.yaml; see below
        overrides = [f"{group}={choice}", f"run_dir={tmp_path}"]
        if name == "sample":
            overrides += [] if group == "relay" else ["relay=two_stages"]
            overrides += [f"relay.start={small_zip}"] if choice == "photos" else []  # it has no first stage
            overrides += [f"reference={small_zip}", "mode=evaluate"]
        elif group != "strategy":
            overrides.append("trainer.accelerator=cpu")
        if group == "data" and choice in ("huggingface", "webdataset"):
            continue  # they read no zips: tests/data/test_formats.py
        if group == "data" and choice != "emoji":
            overrides.append(f"data.dataset.path={small_zip}")
            overrides.append("resolution=16")
        cfg = configuration(name, *overrides)
        if group == "relay":
            for stage in cfg.relay.stages.values():
                stage.path = str(small_zip)  # any file: only its presence is checked here
            validate_sampling(cfg)
            assert instantiate(cfg.relay.postprocess) is None or choice.startswith(("imagenet_256", "celebahq_256"))
        elif group == "metrics":
            evaluator = build_evaluator(cfg.metrics, sampling_options(cfg).reference, (16, 16))
            assert "fid" in evaluator.names
        elif group == "augment":
            validate_training(cfg)
            assert instantiate(cfg.stage.augment) is None or choice == "edm"
        elif group == "strategy":
            if choice != "ddp":  # wants GPUs
                instantiate(cfg.trainer, _convert_="all")
            assert cfg.trainer.num_nodes == 1
        else:
            assert instantiate(cfg[group], _convert_="all") is not None


def test_the_sampling_trainer_builds(configuration):
    cfg = configuration("sample", "relay=two_stages", "trainer.accelerator=cpu")
    assert instantiate(cfg.trainer, _convert_="all").world_size == 1


@pytest.mark.slow
@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_trains_a_step(configuration, large_zip, tmp_path, experiment, request):
    """Networks are thin here; other tests check the published settings."""
    path = f"data.dataset.path={large_zip}"
    known = configuration("train", f"experiment={experiment}", path)
    text = [] if known.text is None else request.getfixturevalue("text_options")
    classes = known.network.num_classes
    validation = []
    if "validation" in known.callbacks:
        copied = shutil.copy(large_zip, tmp_path / "validation.zip")
        validation = [f"callbacks.validation.dataset.{option}" for option in (f"path={copied}", "subset=train")]
    cfg = configuration(
        "train",
        f"experiment={experiment}",
        path,
        f"resolution={min(known.resolution, 256)}",
        "data.batch_size=2",
        "trainer.accumulate_grad_batches=1",
        "data.num_workers=0",
        "network.channels=8",
        "network.blocks=1",
        f"network.num_classes={'null' if classes is None else min(classes, 2)}",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "trainer.max_images=2",
        "callbacks.grid.every_n_images=0",
        f"run_dir={tmp_path}",
        *text,
        *validation,
    )
    validate_training(cfg)
    stage = train(cfg)
    assert stage.images_seen == 2
    assert (tmp_path / "checkpoints/last.ckpt").exists()
    assert OmegaConf.load(tmp_path / "config.yaml").resolution == cfg.resolution


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_images=0", r"trainer\.max_images=0: .* at least 1"),
        ("trainer.max_images=many", r"trainer\.max_images=many"),
        ("data.batch_size=-4", r"data\.batch_size=-4"),
        ("data.batch_size=2.5", r"data\.batch_size=2\.5"),
        ("network.channel_mult=4", r"network\.channel_mult=4: must be a list"),
        ("network.blocks=abc", r"network\.blocks=abc"),
        ("network.image_channels=1", r"network\.image_channels=1"),
        ("trainer.devices=[]", r"trainer\.devices=\[\]"),
        ("resolution=16.0", r"resolution=16\.0: must be a whole number, at least 1: write 16$"),
        ("trainer.max_images=1e3", r"trainer\.max_images=1000\.0: must be a whole number: write 1000$"),
        ("+stage.corruption.block=0", r"stage\.corruption\.block=0"),
        ("callbacks.log.every_n_images=abc", r"callbacks\.log\.every_n_images=abc"),
        ("trainer.accumulate_grad_batches=3", r"data\.batch_size=4 does not divide .* 3 or 6 would work"),
        ("trainer.devices=3", r"data\.batch_size=4 does not divide .*devices x nodes = 3"),
        ("trainer.devices=0", r"trainer\.devices=0"),
        ("trainer.precision=8", r"trainer\.precision=8: use one of"),
        ("network.dropout=1.5", r"network\.dropout=1\.5: must be at least 0 and below 1"),
        ("network.checkpoint_levels=[4]", r"network\.checkpoint_levels=\[4\]: .* 0 to 1"),
        ("network.checkpoint_levels=0", r"network\.checkpoint_levels=0: must be a list"),
        ("network.channel_mult=[]", r"network\.channel_mult=\[\]"),
        ("resolution=15", r"network\.resolution=15: not divisible by 2\^1"),
        ("resolution=[16,15]", r"network\.resolution=\[16, 15\]: not divisible by 2\^1"),
        ("resolution=[16,a]", r"resolution=\[16, 'a'\]: must be a whole number, or \[height, width\]"),
        ("resolution=9600", r"resolution=9600: at most 89,478,485 pixels and 16,384 on a side are supported; use"),
        ("resolution=[16,0]", r"resolution=\[16, 0\]: must lie between 1 and 16,384"),
        ("network.resolution=[16,8]", r"network\.resolution=\[16, 8\] differs from resolution=16; remove network\."),
        ("data.dataset.resolution=8", r"data\.dataset\.resolution=8 differs from resolution=16; remove data\."),
        ("stage.optimizer.lr=-1", r"stage\.optimizer\.lr=-1"),
        ("stage.label_dropout=2", r"stage\.label_dropout=2"),
        ("data.dataset.random_crops=-1", r"data\.dataset\.random_crops=-1: must be a whole number, at least 0"),
        ("data.dataset.random_crops=2000000", r"random_crops=2000000: must be a whole number, between 0 and 1000000"),
        ("data.dataset.path=missing.zip", r"data\.dataset\.path=missing\.zip: no such file"),
        ("data.dataset.path=???", r"data\.dataset\.path has no value"),
        ("network.augment_labels=9", r"network\.augment_labels=9, but stage\.augment is null"),
        ("stage.guidance_interval=[1,2]", r"stage\.guidance_interval=\[1, 2\] has no effect"),
        ("stage.guidance_scale=2", r"stage\.guidance_scale=2: .*train with stage\.label_dropout=0\.1"),
        ("trusted=my_package", r"trusted=my_package: must be a list of packages, e\.g\. \[my_package\]"),
        ("trusted=[my-package]", r"trusted holds my-package: must be names of packages"),
        ("stage=cascade stage.corruption.condition_noise_max=a", r"stage\.corruption\.condition_noise_max=a: "),
        ("network.condition_channels=3", r"network\.condition_channels=3: DiffusionStage provides 0"),
        ("sampler=blurring", r"stage\.sampler=BlurringSampler: starts from images, and GaussianCorruption from noise"),
        ("stage=relay sampler=edm", r"stage\.sampler=EDMSampler: starts from noise, and Blurring\w+ from images"),
        ("stage=relay sampler=multistep", r"stage\.sampler\.sigma_max=120\.0: .* beyond the end"),
        (
            "stage=relay network.condition_channels=3",
            r"network\.condition_channels=3: DiffusionStage provides 0 .*set network\.condition_channels=0",
        ),
        (
            "stage=cascade network.condition_channels=0",
            r"network\.condition_channels=0: CascadeStage provides 3 .*set network\.condition_channels=3",
        ),
    ],
)
def test_errors_name_invalid_training_options(configuration, small_zip, override, message):
    options = [*TINY, "network.channel_mult=[1,2]", "resolution=16", f"data.dataset.path={small_zip}"]
    with pytest.raises(UserError, match=message):
        validate_training(configuration("train", *options, *override.split()))


def test_a_fused_optimizer_is_rejected_with_fp16(configuration, small_zip):
    half = (*TINY, "resolution=16", f"data.dataset.path={small_zip}", "trainer.precision=16-mixed")
    assert not configuration("train", *half).stage.optimizer.fused
    with pytest.raises(UserError, match=r"stage\.optimizer\.fused=True: cannot see .*16-mixed"):
        validate_training(configuration("train", *half, "trainer.accelerator=gpu", "stage.optimizer.fused=true"))


def test_guidance_needs_classes_or_text(configuration, small_zip):
    options = (*TINY, "resolution=16", f"data.dataset.path={small_zip}", "network.num_classes=0")
    options = (*options, "stage.guidance_scale=2")
    validate_training(configuration("train", *options, "stage.label_dropout=0.1", "text=minilm"))
    cfg = configuration("train", *options)
    with pytest.raises(
        UserError,
        match=r"^stage\.guidance_scale=2, but the network is unconditional",
    ):
        validate_training(cfg)


def test_a_block_that_does_not_divide_is_named(configuration, small_zip):
    cfg = configuration(
        "train", *TINY, "stage=relay", "resolution=16", f"data.dataset.path={small_zip}", "stage.corruption.block=3"
    )
    with pytest.raises(UserError, match=r"resolution=16 is not divisible by stage\.corruption\.block=3; use 18$"):
        validate_training(cfg)
    cfg.resolution = [12, 16]
    with pytest.raises(
        UserError, match=r"resolution=\[12, 16\] is not divisible by stage\.corruption\.block=3; use \[12, 18\]$"
    ):
        validate_training(cfg)
    cfg.resolution = [12, 18]
    validate_training(cfg)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mode=draw", "mode=draw: use sample or evaluate"),
        ("batch_size=0", "batch_size=0"),
        ("picture=-1", "picture=-1"),
        ("relay.resolution=9600", r"relay\.resolution=9600: at most 89,478,485 pixels and 16,384 on a side are supp"),
        ("relay.resolution=0", r"relay\.resolution=0: must be a whole number, at least 1"),
        ("relay.resolution=[16]", r"relay\.resolution=\[16\]: must be a whole number, or \[height, width\]"),
        ("png_compression=10", "png_compression=10: must be a whole number, between 0 and 9"),
        ("relay.stages.base.path=missing", r"relay\.stages\.base\.path=missing: no such file"),
        ("relay.stages.base.guide=missing", r"relay\.stages\.base\.guide=missing: no such file"),
        ("relay.first=relay", r"relay\.start is missing: the stage relay\.first=relay starts from images"),
        ("relay.last=third", r"relay\.last=third: use one of base, relay"),
        ("relay.last=base relay.start=conf", r"relay\.last=base is before"),
        ("relay.start=missing", r"relay\.start=missing: no such"),
        ("relay.start_subset=train", r"relay\.start_subset=train: give relay\.start=FOLDER"),
        ("relay.start=conf relay.start_subset=null", r"relay\.start_subset=None: must be the name of a folder"),
        ("relay.start=conf relay.start_exif=off", r"relay\.start_exif=off: use apply or ignore"),
        ("relay.start_exif=ignore", r"relay\.start_exif=ignore: give relay\.start=FOLDER"),
        ("relay.start_size=own", r"relay\.start_size=own: give relay\.start=FOLDER"),
        ("relay.start=conf relay.start_size=all", r"relay\.start_size=all: use own, input or null"),
        (
            "relay.start=conf relay.start_size=own mode=evaluate",
            r"relay\.start_size=own: mode=evaluate needs images of one",
        ),
        ("relay.start=conf relay.start_size=own relay.resolution=64", r"relay\.resolution=64: images keep their size"),
        ("relay.tile=256", r"relay\.tile=256: give relay\.start=FOLDER"),
        ("relay.start=conf relay.tile=[256]", r"relay\.tile=\[256\]: must be a whole number, or \[height, width\]"),
        ("relay.start=conf relay.overlap=0", r"relay\.overlap=0: must be a whole number, at least 1"),
        ("relay.start=conf relay.tile_batch=0", r"relay\.tile_batch=0: must be a whole number, at least 1"),
        ("relay.repeat=2", r"relay\.repeat=2: give relay\.start=FOLDER"),
        ("relay.start=conf relay.repeat=9", r"relay\.repeat=9: must be a whole number, between 1 and 8"),
        ("relay.start=conf relay.hand_over_sigma=1", r"relay\.hand_over_sigma .* starts from noise"),
        ("relay.hand_over_sigma=a", r"relay\.hand_over_sigma=a: must be a number"),
        ("relay.consistency=yes", r"relay\.consistency=yes: use true or false"),
        ("relay.rounding=up", r"relay\.rounding=up: use nearest or floor"),
        ("format=jpeg", "format=jpeg: use png or zip"),
        ("npz=no", "npz=no: use true or false"),
        ("images=conf", "images=conf are evaluated only: add mode=evaluate"),
        ("images=conf mode=evaluate", r"images=conf: give reference="),
        ("images=conf mode=evaluate reference=conf seeds=3", r"seeds=3 cannot be set: images=conf"),
        (
            "images=conf mode=evaluate reference=conf npz=true",
            r"evaluated only; remove format, npz and save_trajectory",
        ),
        ("images=conf mode=evaluate reference=conf save_trajectory=true", r"remove format, npz and save_trajectory"),
        ("save_trajectory=-1", "save_trajectory=-1: use true, false or a number of images"),
        ("save_trajectory=yes", "save_trajectory=yes: use true, false or a number of images"),
        ("images=missing mode=evaluate reference=conf", r"images=missing: no such"),
        ("mode=evaluate", r"give reference="),
        ("mode=evaluate reference=missing", r"reference=missing: no such file"),
    ],
)
def test_errors_name_invalid_sampling_options(configuration, small_zip, override, message):
    paths = [f"relay.stages.{name}.path={small_zip}" for name in ("base", "relay")]
    cfg = configuration("sample", "relay=two_stages", *paths, *override.split())
    with pytest.raises(UserError, match=message):
        validate_sampling(cfg)


def test_the_weights_of_a_stage_may_be_left_out(configuration, small_zip):
    paths = [f"relay.stages.{name}.path={small_zip}" for name in ("base", "relay")]
    left_out = ["~relay.stages.base.weights", "relay.stages.relay.weights=both"]
    with pytest.raises(UserError, match=r"^relay\.stages\.relay\.weights=both: use ema or raw"):
        validate_sampling(configuration("sample", "relay=two_stages", *paths, *left_out))


def test_stages_that_do_not_run_need_no_checkpoint(configuration, small_zip):
    first = f"relay.stages.base.path={small_zip}"
    cfg = configuration("sample", "relay=three_stages", first, "relay.last=base")
    validate_sampling(cfg)
    assert list(chosen_stages(cfg.relay)) == ["base"]
    later = [f"relay.stages.{name}.path={small_zip}" for name in ("relay", "third")]
    cfg = configuration("sample", "relay=three_stages", *later, f"relay.start={small_zip}")
    validate_sampling(cfg)
    assert list(chosen_stages(cfg.relay)) == ["relay", "third"]
    cfg = configuration("sample", "relay=three_stages", *later, f"relay.start={small_zip}", "relay.first=third")
    assert list(chosen_stages(cfg.relay)) == ["third"]


def test_the_reference_defaults_to_that_of_the_relay(configuration):
    cfg = configuration("sample", "relay=quickstart")
    assert reference_of(cfg) == {"path": "demo/emoji-64.zip", "subset": "heldout"}
    assert reference_of(configuration("sample", "relay=quickstart", "reference=x")) == {"path": "x", "subset": ""}


def test_a_run_of_another_day_is_found_by_its_id(tmp_path):
    assert _run_dir(str(tmp_path), "mine").endswith("/mine")
    (tmp_path / "2020-01-01/mine").mkdir(parents=True)
    assert _run_dir(str(tmp_path), "mine") == str(tmp_path / "2020-01-01/mine")


@pytest.mark.parametrize("name", ["a*", "[1]", "a?b", "run.1 (x)"])
def test_a_run_id_is_a_literal_name(tmp_path, name):
    for other in ("2020-01-01/ab", "2020-01-01/1", "2020-01-01/axb"):
        (tmp_path / other).mkdir(parents=True)
    assert Path(_run_dir(str(tmp_path), name)).parts[-1] == name
    assert not Path(_run_dir(str(tmp_path), name)).exists()  # nobody else's
    (tmp_path / "2020-01-02" / name).mkdir(parents=True)
    assert _run_dir(str(tmp_path), name) == str(tmp_path / "2020-01-02" / name)


@pytest.mark.parametrize("name", ["a/b", "..", ".", "/a", "a" * 201, "'a'", 'a"b', "a\\\\b"])
@pytest.mark.parametrize("command", ["train", "sample"])
def test_a_run_id_that_is_no_name_of_a_directory(configuration, small_zip, command, name):
    cfg = configuration(command, f"data.dataset.path={small_zip}" if command == "train" else "relay=quickstart")
    cfg.run_id = name
    with pytest.raises(UserError, match=r"run_id=.*: must be the name of one directory"):
        (validate_training if command == "train" else validate_sampling)(cfg)
    with pytest.raises(UserError, match=r"run_id=.*: must be the name of one directory"):
        _run_dir("outputs", name)


def test_two_runs_of_one_process_have_two_directories(configuration):
    """All settings of one run have the same directory."""
    first, second = (configuration("train", "logger=wandb") for _ in range(2))
    assert first.run_dir != second.run_dir
    assert first.run_dir.endswith(f"/{first.run_id}")
    assert first.logger.wandb.run_id == first.run_id
    assert OmegaConf.to_container(copy.deepcopy(first), resolve=True)["run_id"] == first.run_id
    assert RUN_ID not in os.environ


def test_a_run_of_wandb_agent_has_the_id_that_the_agent_gives(configuration, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_ID", "ab12cd34")
    assert configuration("train").run_id != "ab12cd34"
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    assert configuration("train").run_id == "ab12cd34"


def test_ranks_of_one_job_share_a_run_id(monkeypatch):
    def ids(command, **environment):
        for key, value in environment.items():
            monkeypatch.setenv(key, value)
        monkeypatch.setattr("sys.argv", command)
        found = set()
        for rank in ("0", "1"):
            monkeypatch.setenv("RANK", rank)
            found.add(_new_run_id())
        assert RUN_ID not in os.environ
        return found

    ranks = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    assert len(ids(["train.py"], **ranks)) == 1
    assert len(ids(["train.py"], TORCHELASTIC_RUN_ID="job")) == 1
    train, other = ids(["train.py"], SLURM_JOB_ID="12"), ids(["train.py", "seed=1"], SLURM_JOB_ID="12")
    assert len(train) == len(other) == 1
    assert train != other  # two commands of one job do not share a directory
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(UserError, match="run_id=NAME"):
        ids(["train.py"], TORCHELASTIC_RUN_ID="none", LOCAL_WORLD_SIZE="1")


def test_world_size():
    assert world_size(4, 2) == 8
    assert world_size([0, 2], 3) == 6
    assert world_size("auto", 1) is None


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)])
def test_the_optimizer_is_fused_unless_gradients_are_scaled(configuration, precision, fused):
    """A fused step would unscale after infinite gradients are replaced."""
    assert configuration("train", f"trainer.precision={precision}").stage.optimizer.fused is fused
    assert configuration("train", "experiment=imagenet_64").stage.optimizer.fused is False


@pytest.mark.parametrize("stage", ["base", "relay", "cascade"])
@pytest.mark.parametrize(("sampler", "target"), [("edm", "EDMSampler"), ("blurring", "BlurringSampler")])
def test_a_sampler_replaces_that_of_the_stage(configuration, stage, sampler, target):
    chosen = configuration("train", f"stage={stage}", f"sampler={sampler}").stage.sampler
    assert chosen._target_ == f"relay_diffusion.samplers.{target}"
    assert ("churn" in chosen, "s_noise" in chosen) == (sampler == "edm", sampler == "blurring")
