"""Checks of a train configuration before anything is built. Imports neither torch nor lightning."""

from __future__ import annotations

import re

from omegaconf import DictConfig, ListConfig

from relay_diffusion.checkpoints.targets import package_names
from relay_diffusion.config.checks import (
    HUGE,
    INFINITY,
    check_built,
    check_choice,
    check_complete,
    check_devices,
    check_directory,
    check_file,
    check_flag,
    check_list,
    check_mapping,
    check_number,
    check_run_id,
    check_subset,
    check_text,
    check_whole,
    is_number,
    is_whole,
    selected,
    there,
    world_size,
)
from relay_diffusion.errors import require
from relay_diffusion.utils.messages import shorten

MANY = 10**15  # images
WHOLE = {  # key: lowest, highest
    "resolution": (1, 2**14),
    "seed": (0, 2**32 - 1),
    "network.resolution": (1, 2**14),
    "data.batch_size": (1, 2**24),
    "data.num_workers": (0, 1024),
    "data.seed": (0, 2**63 - 1),
    "network.channels": (2, 2**14),
    "network.blocks": (1, 100),
    "network.num_classes": (0, 10**6),
    "network.augment_labels": (0, 1024),
    "network.condition_channels": (0, 1024),
    "stage.seed": (0, 2**63 - 1),
    "stage.warmup_images": (0, MANY),
    "trainer.max_images": (1, MANY),
}
TRAINER = {  # options of our trainer, which others may lack
    "accumulate_grad_batches": (1, 2**24),
    "max_nonfinite_steps": (1, 10**9),
    "limit_train_batches": (1, MANY),
}
NUMBERS = {
    "network.dropout": (0, 1),
    "stage.label_dropout": (0, 1),
    "stage.guidance_scale": (-HUGE, HUGE),
    "stage.optimizer.lr": (0, HUGE),
}
IF_THERE = {  # of classes that others may replace
    "stage.denoiser.sigma_data": (1e-12, HUGE),
    "stage.loss.sigma_data": (1e-12, HUGE),
    "stage.loss.max_weight": (0, INFINITY),
    "stage.corruption.schedule.p_mean": (-100, 100),
    "stage.corruption.schedule.p_std": (1e-6, 100),
    "stage.corruption.schedule.sigma_floor": (1e-12, HUGE),
    "stage.corruption.condition_noise_max": (0, HUGE),
    "stage.corruption.condition_noise": (0, HUGE),
}
CALLBACKS = {  # option of any callback: lowest, highest
    "every_n_images": (0, MANY),
    "half_life_images": (0, MANY),
    "max_images": (1, MANY),
    "bins": (1, 1000),
    "keep": (0, 10**6),
    "count": (1, 10**6),
    "batch_size": (1, 10**6),
}
NO_EPOCHS = "training is one endless stream of images, without epochs"
NO_LOOP = "there is no validation loop: callbacks=validation and callbacks=evaluated measure while training"
UNSUPPORTED = {  # options of Lightning's Trainer that do not apply, and why
    "barebones": "it would turn off logs and checkpoints",
    "benchmark": "it is on unless trainer.deterministic=true",
    "callbacks": "callbacks are a group of their own: callbacks.NAME.OPTION=..., +callbacks.NAME._target_=...",
    "check_val_every_n_epoch": NO_LOOP,
    "detect_anomaly": "it does not go with CUDA graphs; train/replaced_gradients counts non-finite gradients",
    "enable_autolog_hparams": "the run's resolved configuration is always logged",
    "enable_checkpointing": "use ~callbacks.checkpoints to write none",
    "enable_model_summary": "the number of parameters is on the first line of every run",
    "enable_progress_bar": "RELAY_DIFFUSION_QUIET=1 turns progress off",
    "inference_mode": "it is about validation and prediction; training does neither",
    "limit_predict_batches": "training predicts nothing",
    "limit_test_batches": "training tests nothing",
    "limit_val_batches": NO_LOOP,
    "log_every_n_steps": "set callbacks.log.every_n_images",
    "logger": "loggers are a group of their own: logger=wandb",
    "max_epochs": f"{NO_EPOCHS}: set trainer.max_images",
    "max_steps": "amounts are in images: set trainer.max_images, or trainer.limit_train_batches for this start alone",
    "min_epochs": NO_EPOCHS,
    "min_steps": "amounts are in images, and only trainer.max_images ends a run unasked",
    "model_registry": "callbacks.checkpoints.upload=true hands checkpoints to the loggers",
    "num_sanity_val_steps": NO_LOOP,
    "overfit_batches": "train on a folder of a few images instead: data.dataset.subset",
    "plugins": "precision and strategy are set by trainer.precision and strategy=",
    "reload_dataloaders_every_n_epochs": NO_EPOCHS,
    "sync_batchnorm": "the networks have no batch normalisation",
    "use_distributed_sampler": "the data module deals the stream out to the devices itself",
    "val_check_interval": NO_LOOP,
}
BUILT_BY = "relay_diffusion.training.trainer.build_trainer"
UNITS = ("weeks", "days", "hours", "minutes", "seconds")
FLAGS = ("network.channels_last", "stage.cuda_graphs")


def fused_optimizer(precision: str) -> bool:
    """False for fp16: its loss scaling finds infinite gradients before they are replaced, a fused step would after."""
    return not str(precision).startswith("16")


def validate_training(cfg: DictConfig) -> None:
    """Raise UserError for the first thing in a train config that cannot work."""
    check_mapping(cfg, "data", "data.dataset", "network", "stage", "stage.denoiser", "trainer", "callbacks", "logger")
    check_run_id(selected(cfg, "run_id"))
    check_complete(cfg)
    check_directory(cfg, "run_dir")
    package_names(cfg.trusted)
    for key in ("data", "data.dataset", "network", "stage", "stage.denoiser", "stage.denoiser.network"):
        check_built(cfg, key)
    for key in ("stage.corruption", "stage.loss", "stage.sampler", "stage.optimizer"):
        check_built(cfg, key)
    check_built(cfg, "stage.augment", null=True)
    check_devices(cfg)
    if selected(cfg, "trainer._target_") == BUILT_BY:
        _check_trainer(cfg)
    for key, (least, most) in WHOLE.items():
        check_whole(cfg, key, least, most)
    for key, (low, high) in NUMBERS.items():
        check_number(cfg, key, low, high)
    for key, (low, high) in IF_THERE.items():
        if there(cfg, key):
            check_number(cfg, key, low, high)
    for key in FLAGS:
        check_flag(cfg, key)
    _check_callbacks(cfg)
    fused = selected(cfg, "stage.optimizer.fused")
    require(
        not fused or fused_optimizer(cfg.trainer.precision),
        f"stage.optimizer.fused={shorten(fused)} does not go with trainer.precision={cfg.trainer.precision}, whose "
        "infinite gradients are to be seen first: use stage.optimizer.fused=false or trainer.precision=bf16-mixed",
    )
    _check_network(cfg)
    _check_stage(cfg)
    _check_dataset(cfg)
    for key in ("resume", "init"):
        if cfg[key] is not None:
            check_file(cfg[key], key)
    require(
        cfg.resume is None or cfg.init is None,
        "resume continues a run and init begins a new one with its weights: give one of them",
    )
    _check_batch(cfg)


def _check_trainer(cfg: DictConfig) -> None:
    """Lightning's options that we take, and those that we do not."""
    for option in cfg.trainer:
        require(str(option) not in UNSUPPORTED, f"trainer.{option} is not supported: {UNSUPPORTED.get(str(option))}")
    for option, (least, most) in TRAINER.items():
        check_whole(cfg, f"trainer.{option}", least, most, null=option == "limit_train_batches")
    check_number(cfg, "trainer.gradient_clip_val", 0, HUGE, null=True)
    check_choice(cfg, "trainer.gradient_clip_algorithm", ("norm", "value"))
    steps = selected(cfg, "trainer.fast_dev_run")
    require(
        isinstance(steps, bool) or (is_whole(steps) and 0 <= steps <= MANY),
        f"trainer.fast_dev_run={shorten(steps)}: use true, false or a number of batches",
    )
    profiler = selected(cfg, "trainer.profiler")
    if profiler is not None:
        check_choice(cfg, "trainer.profiler", ("simple", "advanced", "pytorch"))
    time = selected(cfg, "trainer.max_time")
    if isinstance(time, DictConfig):
        valid = len(time) > 0 and all(unit in UNITS and is_number(n) and 0 <= n < 10**6 for unit, n in time.items())
    else:
        valid = time is None or (isinstance(time, str) and re.fullmatch(r"\d{1,6}:\d\d:\d\d:\d\d", time) is not None)
    require(valid, f"trainer.max_time={shorten(time)}: write DD:HH:MM:SS, or {{hours: 8}} ({', '.join(UNITS)})")


def _check_callbacks(cfg: DictConfig) -> None:
    for group in ("callbacks", "logger"):
        for name in cfg[group]:
            require(selected(cfg, f"{group}.{name}") is not None, f"{group}.{name}=null: use ~{group}.{name}")
            check_built(cfg, f"{group}.{name}")
    for name, callback in cfg.callbacks.items():
        for option, (least, most) in CALLBACKS.items():
            if option in callback:
                check_whole(cfg, f"callbacks.{name}.{option}", least, most)
        if "best" in callback:
            check_text(cfg, f"callbacks.{name}.best", null=True)
        if "best_mode" in callback:
            check_choice(cfg, f"callbacks.{name}.best_mode", ("min", "max"))
        require(
            callback.get("check_on_train_epoch_end") is not True,
            f"callbacks.{name}.check_on_train_epoch_end=true: {NO_EPOCHS}; without it, the metric is checked where it "
            "is logged",
        )
        if "ramp_up" in callback:
            check_number(cfg, f"callbacks.{name}.ramp_up", 0, HUGE, null=True)
        if "directory" in callback:
            check_directory(cfg, f"callbacks.{name}.directory")


def _check_resolution(cfg: DictConfig, key: str) -> None:
    value = selected(cfg, key)
    require(value == cfg.resolution, f"{key}={shorten(value)} is not resolution={cfg.resolution}: leave {key} out")


def _check_dataset(cfg: DictConfig) -> None:
    """A dataset of another kind has options of its own; what it shares with ours means the same."""
    dataset = cfg.data.dataset
    for flag in ("labels", "x_flip", "cache"):
        if flag in dataset:
            check_flag(cfg, f"data.dataset.{flag}")
    if "resolution" in dataset:
        check_whole(cfg, "data.dataset.resolution", 1, 2**14)
        _check_resolution(cfg, "data.dataset.resolution")
    if "path" in dataset:
        check_text(cfg, "data.dataset.path")
        check_file(dataset.path, "data.dataset.path")
    if "subset" in dataset:
        check_subset(cfg, "data.dataset.subset")
    if "exif" in dataset:
        check_choice(cfg, "data.dataset.exif", ("apply", "ignore"))


def _check_network(cfg: DictConfig) -> None:
    check_list(cfg, "network.channel_mult", 1, 64, "[1,2,2], one a level")
    levels = len(cfg.network.channel_mult)
    require(1 <= levels <= 14, f"network.channel_mult={shorten(cfg.network.channel_mult)}: needs 1 to 14 levels")
    require(
        cfg.network.image_channels == 3, f"network.image_channels={shorten(cfg.network.image_channels)}: images have 3"
    )
    require(
        cfg.resolution % 2 ** (levels - 1) == 0,
        f"resolution={cfg.resolution} is not divisible by 2^{levels - 1}, as network.channel_mult with {levels} levels "
        "demands",
    )
    _check_resolution(cfg, "network.resolution")
    check_list(cfg, "network.attention_resolutions", 1, 2**14, "[16,8]")
    check_list(cfg, "network.checkpoint_levels", 0, levels - 1, "[0]")


def _check_stage(cfg: DictConfig) -> None:
    if there(cfg, "stage.corruption.block"):
        check_whole(cfg, "stage.corruption.block", 1, 2**14)
        require(
            cfg.resolution % cfg.stage.corruption.block == 0,
            f"resolution={cfg.resolution} is not divisible by stage.corruption.block={cfg.stage.corruption.block}",
        )
    if there(cfg, "stage.corruption.schedule.prob_length"):
        check_number(cfg, "stage.corruption.schedule.prob_length", 0, HUGE)
        length = cfg.stage.corruption.schedule.prob_length
        require(0 < length <= 1, f"stage.corruption.schedule.prob_length={length}: training needs (0, 1]")
    augmented, augment_labels = cfg.stage.augment is not None, cfg.network.augment_labels
    require(
        augmented == (augment_labels > 0),
        f"network.augment_labels={augment_labels}, but stage.augment is {'set' if augmented else 'null'}: "
        "use augment=edm, or augment=none",
    )
    conditioned, channels = there(cfg, "stage.corruption.condition_noise"), cfg.network.condition_channels
    require(
        channels == (cfg.network.image_channels if conditioned else 0),
        f"network.condition_channels={channels}, but the stage is {'' if conditioned else 'not '}conditioned: "
        + ("use network.condition_channels=3" if conditioned else "use stage=cascade, or network.condition_channels=0"),
    )
    mirrored = augmented and selected(cfg, "stage.augment.x_flip")
    require(
        not (mirrored and selected(cfg, "data.dataset.x_flip", False)),
        "data.dataset.x_flip=true mirrors images that stage.augment mirrors too: set one of them to false",
    )
    interval = cfg.stage.guidance_interval
    if interval is not None:
        pair = isinstance(interval, ListConfig) and len(interval) == 2 and all(is_number(sigma) for sigma in interval)
        require(
            pair and 0 <= interval[0] <= interval[1],
            f"stage.guidance_interval={shorten(interval)}: must be [lowest sigma, highest sigma], or null",
        )
    require(
        interval is None or cfg.stage.guidance_scale != 1,
        f"stage.guidance_interval={shorten(interval)} has no use with stage.guidance_scale=1, which is no guidance",
    )
    require(
        cfg.network.num_classes == 0 or cfg.stage.guidance_scale == 1 or cfg.stage.label_dropout > 0,
        f"stage.guidance_scale={cfg.stage.guidance_scale} needs stage.label_dropout above 0, e.g. 0.1: the network "
        "must also learn the estimate without class",
    )
    for key, idle in (("guidance_scale", 1), ("label_dropout", 0)):
        require(
            cfg.network.num_classes > 0 or cfg.stage[key] == idle,
            f"stage.{key}={cfg.stage[key]} needs classes, but network.num_classes is 0",
        )


def _check_batch(cfg: DictConfig) -> None:
    world = world_size(cfg.trainer.devices, cfg.trainer.num_nodes)
    if world is not None:
        accumulate = selected(cfg, "trainer.accumulate_grad_batches", 1)
        parts = world * accumulate
        fits = max(parts, cfg.data.batch_size // parts * parts)
        require(
            cfg.data.batch_size % parts == 0,
            f"data.batch_size={cfg.data.batch_size} does not divide over {world} devices (trainer.devices x "
            f"trainer.num_nodes) x trainer.accumulate_grad_batches={accumulate}: {fits} would",
        )
