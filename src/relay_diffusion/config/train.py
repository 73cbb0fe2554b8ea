"""Checks of a train configuration before anything is built."""

from __future__ import annotations

import copy
import math
from typing import Any

from omegaconf import DictConfig, ListConfig

from relay_diffusion.checkpoints.hub import is_address
from relay_diffusion.checkpoints.targets import package_names
from relay_diffusion.config.checks import (
    MAKE_DATA,
    check_built,
    check_checkpoint,
    check_complete,
    check_devices,
    check_directory,
    check_file,
    check_mapping,
    check_resolution,
    check_run_id,
    check_strategy,
    check_whole,
    is_number,
    selected,
    world_size,
)
from relay_diffusion.config.parts import MetaBuilder, check_call, check_hooks, check_types, explain_option
from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.messages import shorten
from relay_diffusion.utils.resolution import image_size, resolution_of

WHOLE = {  # integer settings without a constructor on the meta device: lowest, highest
    "seed": (0, 2**32 - 1),
    "data.batch_size": (1, 2**24),
    "data.num_workers": (0, 1024),
    "data.seed": (0, 2**63 - 1),
}
AT_LEAST_0 = ("lr", "eps", "weight_decay", "momentum")  # options of torch's optimizers
NO_EPOCHS = "training is one endless stream of images, without epochs"
NO_LOOP = "there is no validation loop: use callbacks=validation or callbacks=evaluated"
UNSUPPORTED = {  # options of Lightning's Trainer that have an alternative
    "benchmark": "it is on unless trainer.deterministic=true",
    "callbacks": "set callbacks in their config group: callbacks.NAME.OPTION=..., +callbacks.NAME._target_=...",
    "enable_checkpointing": "use ~callbacks.checkpoints to write none",
    "enable_progress_bar": "RELAY_DIFFUSION_QUIET=1 turns progress off",
    "limit_val_batches": NO_LOOP,
    "log_every_n_steps": "set callbacks.log.every_n_images",
    "logger": "set loggers in their config group: logger=wandb",
    "max_epochs": f"{NO_EPOCHS}: set trainer.max_images",
    "max_steps": "amounts are in images: set trainer.max_images, or trainer.limit_train_batches for the present start",
    "model_registry": "callbacks.checkpoints.upload=true sends checkpoints to the loggers",
    "overfit_batches": "train on a folder of a few images instead: data.dataset.subset",
    "plugins": "precision and strategy are set by trainer.precision and strategy=",
    "val_check_interval": NO_LOOP,
}
BUILT_BY = "relay_diffusion.training.trainer.build_trainer"


def fused_optimizer(precision: str) -> bool:
    """Return whether the optimizer may be fused: not for fp16.

    The loss scaling of fp16 must detect infinite gradients before they are replaced; a fused step detects them after.
    """
    return not str(precision).startswith("16")


def validate_training(cfg: DictConfig) -> None:
    """Check a train config. Raises UserError for the first invalid option.

    The cheapest checks come first: values and files, then parts that import torch, then those that import Lightning,
    which takes seconds.
    """
    check_mapping(cfg, "data", "data.dataset", "network", "stage", "stage.denoiser", "trainer", "callbacks", "logger")
    check_run_id(selected(cfg, "run_id"))
    check_complete(cfg)
    check_built(cfg, "text", null=True)
    cfg = _with_placeholders(cfg)
    check_directory(cfg, "run_dir")
    package_names(cfg.trusted)
    metric = cfg.optimized_metric
    require(metric is None or isinstance(metric, str), f"optimized_metric={shorten(metric)}: must be a name, or null")
    for key in ("data", "data.dataset", "network", "stage", "stage.corruption", "stage.optimizer", "trainer"):
        check_built(cfg, key)
    require(
        selected(cfg, "stage.optimizer._partial_", False),
        "stage.optimizer._partial_=false: the stage adds the weights; add `_partial_: true` to its yaml",
    )
    for key, (least, most) in WHOLE.items():
        check_whole(cfg, key, least, most)
    check_resolution(cfg, "resolution")
    check_devices(cfg)
    _check_dataset(cfg)
    if cfg.resume is not None:
        check_file(cfg.resume, "resume")
    if cfg.init is not None:
        check_checkpoint(cfg.init, "init")
    require(
        cfg.resume is None or cfg.init is None,
        "resume continues a run, init starts a new one from its weights: give one of them",
    )
    _check_network(cfg)
    builder = MetaBuilder(cfg)
    for key in ("network", "stage.corruption"):  # before the stage, so that messages name these keys
        check_types(cfg, key)
        builder.build(key)
    _check_trainer(cfg)
    for key in ("stage", "data", "text"):
        check_types(cfg, key)
    _check_callbacks(cfg, builder)
    _check_stage(cfg)
    stage = builder.build("stage")
    try:
        stage.guided_denoiser()
    except UserError as error:
        raise UserError(explain_option("stage", error, cfg.stage)) from None
    _check_optimizer(cfg, stage)
    _check_batch(cfg)


def _with_placeholders(cfg: DictConfig) -> DictConfig:
    """Return the config with placeholders for inferred values.

    train() takes these from the data and from the text encoder.
    """
    cfg = copy.deepcopy(cfg)
    if selected(cfg, "network.num_classes", 0) is None:
        cfg.network.num_classes = 1
    if cfg.text is not None and selected(cfg, "network.context_dim") == 0:
        cfg.network.context_dim = 1
    return cfg


def _check_trainer(cfg: DictConfig) -> None:
    """Check the options of our trainer; reject unsupported ones of Lightning."""
    ours = selected(cfg, "trainer._target_") == BUILT_BY
    for option in map(str, cfg.trainer if ours else ()):
        require(option not in UNSUPPORTED, f"trainer.{option} is not supported: {UNSUPPORTED.get(option)}")
    check_types(cfg, "trainer")
    check_strategy(cfg)
    if ours:
        from relay_diffusion.training.trainer import training_limits  # keep --help fast

        check_call("trainer", training_limits, cfg.trainer)


def _check_optimizer(cfg: DictConfig, stage: Any) -> None:
    """Check optimizer settings on two small weights, and the precision."""
    import torch  # keep --help fast

    options = {str(name): value for name, value in cfg.stage.optimizer.items() if str(name)[0] != "_"}
    rate = options.get("lr")
    finite = not isinstance(rate, float) or math.isfinite(rate)
    require(finite, f"stage.optimizer.lr={rate}: must be finite, e.g. 3e-4")
    for name in AT_LEAST_0:
        value: Any = options.get(name)
        require(not is_number(value) or value >= 0, f"stage.optimizer.{name}={shorten(value)}: must be at least 0")
    betas = options.get("betas")
    for beta in betas if isinstance(betas, ListConfig) else ():
        valid = not is_number(beta) or 0 <= beta < 1
        require(valid, f"stage.optimizer.betas={shorten(betas)}: each must be at least 0 and below 1")
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
    """Check callbacks and loggers.

    Callbacks with an evaluator or a dataset are built at the start of training.
    """
    for group in ("callbacks", "logger"):
        for name in cfg[group]:
            require(selected(cfg, f"{group}.{name}") is not None, f"{group}.{name}=null: use ~{group}.{name}")
            check_built(cfg, f"{group}.{name}")
            check_types(cfg, f"{group}.{name}")
    for name, callback in cfg.callbacks.items():
        check_hooks(cfg, f"callbacks.{name}")
        require(
            callback.get("check_on_train_epoch_end") is not True,
            f"callbacks.{name}.check_on_train_epoch_end=true: {NO_EPOCHS}; without it, the metric is checked where it "
            "is logged",
        )
        if "directory" in callback:
            check_directory(cfg, f"callbacks.{name}.directory")
        if not any(isinstance(callback[option], DictConfig) for option in callback):
            builder.build(f"callbacks.{name}")


def _check_same_resolution(cfg: DictConfig, key: str) -> None:
    value = selected(cfg, key)
    require(value == cfg.resolution, f"{key}={shorten(value)} differs from resolution={cfg.resolution}; remove {key}")


def _check_dataset(cfg: DictConfig) -> None:
    """Check resolution, path and crops of the dataset, if it has them."""
    if "resolution" in cfg.data.dataset:
        _check_same_resolution(cfg, "data.dataset.resolution")
    if "path" in cfg.data.dataset and not is_address(cfg.data.dataset.path):
        check_file(cfg.data.dataset.path, "data.dataset.path", MAKE_DATA)
    if "text_cache" in cfg.data:
        check_directory(cfg, "data.text_cache")
    if "random_crops" in cfg.data.dataset:
        from relay_diffusion.data.crops import MAX_CROPS  # keep --help fast

        check_whole(cfg, "data.dataset.random_crops", 0, MAX_CROPS)


def _check_network(cfg: DictConfig) -> None:
    channels = selected(cfg, "network.image_channels", 3)
    provided = selected(cfg, "data.dataset.channels", channels)
    require(
        channels == provided,
        f"network.image_channels={shorten(channels)}: data.dataset.channels={shorten(provided)}; remove "
        "network.image_channels",
    )
    _check_same_resolution(cfg, "network.resolution")
    width = selected(cfg, "network.context_dim", 0)
    require(
        cfg.text is not None or width == 0,
        f"network.context_dim={shorten(width)}: text=none; use text=minilm or another encoder, which set it",
    )
    require(
        cfg.text is None or "context_dim" in cfg.network,
        f"network: {shorten(cfg.network._target_)} has no option context_dim, which text needs; use text=none",
    )


def _check_stage(cfg: DictConfig) -> None:
    block, length = (selected(cfg, f"stage.corruption.{key}", 1) for key in ("block", "schedule.prob_length"))
    size = image_size(cfg.resolution)
    require(
        not any(side % block for side in size),
        f"resolution={cfg.resolution} is not divisible by stage.corruption.block={block}; use "
        f"{resolution_of([-(-side // block) * block for side in size])}",
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
        f"stage.guidance_interval={shorten(interval)} has no effect with stage.guidance_scale=1; remove it",
    )


def _check_batch(cfg: DictConfig) -> None:
    from relay_diffusion.data.datamodule import micro_batch_size  # keep --help fast

    world = world_size(cfg.trainer.devices, cfg.trainer.num_nodes) or 1  # "auto": checked again once it is known
    micro_batch_size(cfg.data.batch_size, world, selected(cfg, "trainer.accumulate_grad_batches", 1))
