"""Checks of a train configuration before anything is built."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig

from relay_diffusion.checkpoints.targets import package_names
from relay_diffusion.config.checks import (
    check_built,
    check_complete,
    check_devices,
    check_directory,
    check_file,
    check_mapping,
    check_run_id,
    check_whole,
    selected,
    world_size,
)
from relay_diffusion.config.parts import MetaBuilder, check_call, check_types, explain_option
from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.messages import shorten

WHOLE = {  # settings of the whole run, and of the data, which only training builds: lowest, highest
    "resolution": (1, 2**14),
    "seed": (0, 2**32 - 1),
    "data.batch_size": (1, 2**24),
    "data.num_workers": (0, 1024),
    "data.seed": (0, 2**63 - 1),
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
    "min_steps": "amounts are in images, and no other condition ends a run early by default",
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
    for key in ("data", "data.dataset", "network", "stage", "stage.corruption", "stage.optimizer", "trainer"):
        check_built(cfg, key)
    for key, (least, most) in WHOLE.items():
        check_whole(cfg, key, least, most)
    check_devices(cfg)
    _check_trainer(cfg)
    for key in ("network", "stage", "data"):
        check_types(cfg, key)
    builder = MetaBuilder(cfg)
    _check_callbacks(cfg, builder)
    _check_network(cfg)
    for key in ("network", "stage.corruption"):  # before the stage, so that messages name these
        builder.build(key)
    _check_stage(cfg)
    _check_optimizer(cfg, builder.build("stage"))
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
    """Check the options that our trainer takes, and refuse those of Lightning that do not apply."""
    if selected(cfg, "trainer._target_") == BUILT_BY:
        for option in cfg.trainer:
            require(
                str(option) not in UNSUPPORTED, f"trainer.{option} is not supported: {UNSUPPORTED.get(str(option))}"
            )
    check_types(cfg, "trainer")
    if selected(cfg, "trainer._target_") == BUILT_BY:
        from relay_diffusion.training.trainer import training_limits  # --help does without torch

        check_call("trainer", training_limits, cfg.trainer)


def _check_optimizer(cfg: DictConfig, stage: Any) -> None:
    """Check the optimizer's settings on two small weights, and that it suits the precision."""
    import torch  # --help does without

    options = {str(name): value for name, value in cfg.stage.optimizer.items() if str(name)[0] != "_"}
    try:
        stage.optimizer_factory(torch.nn.Linear(1, 1).parameters())
    except Exception as error:
        raise UserError(explain_option("stage.optimizer", error, options)) from None
    fused = options.get("fused")
    require(
        not fused or fused_optimizer(cfg.trainer.precision),
        f"stage.optimizer.fused={shorten(fused)}: cannot see the infinite gradients of trainer.precision="
        f"{cfg.trainer.precision} before they are replaced; use stage.optimizer.fused=false or "
        "trainer.precision=bf16-mixed",
    )


def _check_callbacks(cfg: DictConfig, builder: MetaBuilder) -> None:
    """Check callbacks and loggers; callbacks with an evaluator or a dataset are built when training starts."""
    for group in ("callbacks", "logger"):
        for name in cfg[group]:
            require(selected(cfg, f"{group}.{name}") is not None, f"{group}.{name}=null: use ~{group}.{name}")
            check_built(cfg, f"{group}.{name}")
            check_types(cfg, f"{group}.{name}")
    for name, callback in cfg.callbacks.items():
        require(
            callback.get("check_on_train_epoch_end") is not True,
            f"callbacks.{name}.check_on_train_epoch_end=true: {NO_EPOCHS}; without it, the metric is checked where it "
            "is logged",
        )
        if "directory" in callback:
            check_directory(cfg, f"callbacks.{name}.directory")
        if not any(isinstance(callback[option], DictConfig) for option in callback):
            builder.build(f"callbacks.{name}")


def _check_resolution(cfg: DictConfig, key: str) -> None:
    value = selected(cfg, key)
    require(value == cfg.resolution, f"{key}={shorten(value)} is not resolution={cfg.resolution}: leave {key} out")


def _check_dataset(cfg: DictConfig) -> None:
    """Check `resolution` and `path`, if the dataset's class has them."""
    if "resolution" in cfg.data.dataset:
        _check_resolution(cfg, "data.dataset.resolution")
    if "path" in cfg.data.dataset:
        check_file(cfg.data.dataset.path, "data.dataset.path")


def _check_network(cfg: DictConfig) -> None:
    channels = selected(cfg, "network.image_channels", 3)
    require(channels == 3, f"network.image_channels={shorten(channels)}: images have 3")
    _check_resolution(cfg, "network.resolution")


def _check_stage(cfg: DictConfig) -> None:
    block, length = (selected(cfg, f"stage.corruption.{key}", 1) for key in ("block", "schedule.prob_length"))
    require(
        cfg.resolution % block == 0,
        f"resolution={cfg.resolution} is not divisible by stage.corruption.block={block}",
    )
    require(length <= 1, f"stage.corruption.schedule.prob_length={length}: must be at most 1 in training")
    augmented, augment_labels = cfg.stage.augment is not None, cfg.network.augment_labels
    require(
        augmented == (augment_labels > 0),
        f"network.augment_labels={augment_labels}, but stage.augment is {'set' if augmented else 'null'}: "
        "use augment=edm, or augment=none",
    )
    mirrored = augmented and selected(cfg, "stage.augment.x_flip")
    require(
        not (mirrored and selected(cfg, "data.dataset.x_flip", False)),
        "data.dataset.x_flip=true mirrors images that stage.augment mirrors too: set one of them to false",
    )
    interval = cfg.stage.guidance_interval
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
