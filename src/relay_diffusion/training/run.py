"""Train a stage from a validated config."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import lightning as L
from hydra.utils import instantiate
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from relay_diffusion.checkpoints.encoders import describe_encoder
from relay_diffusion.checkpoints.loading import check_loadable
from relay_diffusion.checkpoints.reading import LAST
from relay_diffusion.checkpoints.targets import OWN_PACKAGE, inside, package_names
from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.errors import UserError, prefix_errors, require
from relay_diffusion.models.stage import DiffusionStage, StageInfo
from relay_diffusion.networks.ops import report_slow_settings
from relay_diffusion.text import TextEncoder, check_encoder, check_width
from relay_diffusion.training.callbacks.preemption import leave_after_signal, restored_signal_handlers
from relay_diffusion.training.resume import DATA_ORDER, RunRecord, Start, find_start, init_from
from relay_diffusion.training.text import encode_captions
from relay_diffusion.training.trainer import check_logged
from relay_diffusion.utils.distributed import destroy_process_group, on_rank_zero, started_ranks
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.git import git_revision
from relay_diffusion.utils.messages import override, shown_path
from relay_diffusion.utils.quiet import quiet_libraries

LONGEST_PROMPT = 60  # characters of a caption in the printed command


def _build_stage(config: DictConfig, info: StageInfo) -> DiffusionStage:
    """Build the stage of a config with its `info`.

    The config cannot hold `info`, because Hydra converts dataclasses.
    """
    factory = instantiate(config, _convert_="all", _partial_=True)
    try:
        stage = cast(DiffusionStage, factory(info=info))
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"stage: {error}") from None
    try:
        stage.guided_denoiser()  # guidance needs the classes, which only the data may tell
    except UserError as error:
        raise UserError(f"stage.{error}") from None
    return stage


def _check_trusted(node: Any, trusted: tuple[str, ...], key: str = "stage") -> None:
    """Require `trusted` for classes outside this package."""
    for name, value in node.items() if isinstance(node, dict) else ():
        if name == "_target_" and not inside(value, (OWN_PACKAGE, *trusted)):
            packages = ",".join((*trusted, value.partition(".")[0]))
            raise UserError(
                f"{key} is {value}, a class outside relay_diffusion: add trusted=[{packages}], which its checkpoints "
                "need too"
            )
        if f"{key}.{name}" != "stage.optimizer":  # loading ignores it
            _check_trusted(value, trusted, f"{key}.{name}")


def _with_text(cfg: DictConfig, encoder: TextEncoder | None) -> DictConfig:
    """Return the config with the width of the text encoder.

    network.context_dim 0 becomes that width. Raises UserError for another width.
    """
    if encoder is None:
        return cfg
    if not cfg.network.context_dim:
        cfg = copy.deepcopy(cfg)
        cfg.network.context_dim = encoder.dim
    check_width(encoder, cfg.network.context_dim)
    return cfg


def _build_data(config: DictConfig, encoder: TextEncoder | None) -> ImageDataModule:
    """Build the data of a config with its text encoder.

    The config cannot hold the encoder, because Hydra copies it.
    """
    factory = instantiate(config, _convert_="all", _partial_=True)
    try:
        return cast(ImageDataModule, factory(**({} if encoder is None else {"text": encoder})))
    except TypeError as error:
        raise UserError(f"data: {error}") from None


def _with_classes(cfg: DictConfig, data: ImageDataModule) -> DictConfig:
    """Return the config with the number of classes of the data.

    network.num_classes null becomes that number; without classes and text nothing can be dropped, and label_dropout
    becomes 0 with a note. Raises UserError for another number.
    """
    cfg, found = copy.deepcopy(cfg), data.dataset.num_classes
    if cfg.network.num_classes is None:
        cfg.network.num_classes = found
    classes = cfg.network.num_classes
    hint = "" if found else " (python -m relay_diffusion.cli.convert_images makes classes of folders)"
    require(
        classes in (0, found),
        f"network.num_classes={classes}, but {data.dataset.path} has {found} classes: use "
        f"network.num_classes={found}{hint}",
    )
    if cfg.stage.label_dropout and not classes and not cfg.network.get("context_dim"):
        rank_zero_only(print)("note: stage.label_dropout is 0, because the network has neither classes nor text")
        cfg.stage.label_dropout = 0.0
    return cfg


@quiet_libraries()
def train(cfg: DictConfig) -> DiffusionStage | None:
    """Train a stage, new or resumed; None if training is complete."""
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    encoder: TextEncoder | None = instantiate(cfg.text, _convert_="all")
    if encoder is not None:
        check_encoder(encoder)
    data = _build_data(cfg.data, encoder)
    cfg = _with_classes(_with_text(cfg, encoder), data)
    stage_config = cast(dict[str, Any], OmegaConf.to_container(cfg.stage, resolve=True))
    test_steps = int(cfg.trainer.get("fast_dev_run", False))
    text = None
    if encoder is not None:
        text = describe_encoder(cast(dict[str, Any], OmegaConf.to_container(cfg.text, resolve=True)), encoder)
    stage = _build_stage(cfg.stage, StageInfo(stage_config, data.dataset.class_names, text=text))
    for part, key in ((stage_config, "stage"), (text and text["encoder"], "text")):
        _check_trusted(part, package_names(cfg.trusted), key)
    with prefix_errors("stage: its checkpoint could not be loaded"):
        check_loadable(stage_config, text, cfg.trusted, Path(LAST))
    record = RunRecord(cfg)
    callbacks = instantiate(cfg.callbacks, _convert_="all").values()
    if cfg.optimized_metric is not None:
        check_logged("optimized_metric", cfg.optimized_metric, list(callbacks))
    trainer: L.Trainer = instantiate(
        cfg.trainer,
        callbacks=[*callbacks, record],
        logger=[] if test_steps else list(instantiate(cfg.logger, _convert_="all").values()),
        _convert_="all",
    )
    with started_ranks(trainer, str(cfg.run_id), cfg.run_dir, "run_dir"):
        start = Start()
        if not test_steps:
            start = on_rank_zero(trainer, lambda: find_start(cfg, data, record.of(trainer, data), text))
        if start.own and start.images_seen >= cfg.trainer.max_images:
            if trainer.is_global_zero:
                print(
                    f"{shown_path(cfg.run_dir)}: training is complete ({start.images_seen:,} images seen); "
                    "raise trainer.max_images to continue"
                )
            return None
        if start.checkpoint is not None and not start.checkpoint.is_file():
            raise UserError(f"{start.checkpoint} is not on this host: run_dir must be on a file system of all hosts")
        initial = ""
        if start.checkpoint is None and cfg.init is not None:
            initial = init_from(stage, cfg.init, cfg.trusted)
        if data.text is not None:
            others = [getattr(callback, "dataset", None) for callback in callbacks]  # of Validation
            datasets = [data.dataset, *(dataset for dataset in others if isinstance(dataset, ImageDataset))]
            encode_captions(trainer, data.text, datasets)
        if trainer.is_global_zero:
            _announce(cfg, trainer, stage, data, start, initial)
        with restored_signal_handlers():
            trainer.fit(stage, datamodule=data, ckpt_path=start.checkpoint, weights_only=True)
    if stage.images_seen < cfg.trainer.max_images and stage.fit_state.stop_signal:
        destroy_process_group()  # no rank is in a collective now
        leave_after_signal(trainer, stage.fit_state.stop_signal)
    if test_steps and stage.nonfinite_steps.now():
        raise UserError("trainer.fast_dev_run: the last step had no finite loss, or no finite gradient")
    if trainer.is_global_zero:
        print(_how_it_ended(cfg, trainer, stage))
        if "checkpoints" in cfg.callbacks and not test_steps:
            print(f"sample: {sampling_command(cfg, stage, data.dataset)}")
    return stage


def _how_it_ended(cfg: DictConfig, trainer: L.Trainer, stage: DiffusionStage) -> str:
    """Describe the end of a run in one line."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return f"trainer.fast_dev_run: trained on {stage.images_seen:,} images as a test, without checkpoint and log"
    done, where = f"{stage.images_seen:,}", shown_path(cfg.run_dir)
    if cfg.trainer.get("profiler"):
        where += ", times in fit-profile*.txt"
    early = [callback.stopping_reason_message or "" for callback in trainer.early_stopping_callbacks]
    reasons = [stage.fit_state.stop_reason, *(text.removesuffix(" Signaling Trainer to stop.") for text in early)]
    reason = next(filter(None, reasons), "")
    if reason and stage.images_seen < cfg.trainer.max_images:
        return f"stopped early ({reason}): trained on {done} of {cfg.trainer.max_images:,} images; see {where}"
    return f"trained on {done} images; see {where}"


def sampling_command(cfg: DictConfig, stage: DiffusionStage, trained: ImageDataset) -> str:
    """Return the command of sample.py that samples the trained stage.

    A first stage starts from noise, with text from a caption. Others enlarge up to 16 of the images in `trained`, with
    their captions; with crops, one whole image.
    """
    relay, name = ("cascade", "cascade") if stage.conditioned else ("two_stages", "relay")
    relay, name = ("one_stage", "base") if stage.corruption.block == 1 else (relay, name)
    directory = Path(cfg.callbacks.checkpoints.directory)
    run = directory.parent if directory.name == "checkpoints" else directory
    words = {"relay": relay, f"relay.stages.{name}.path": shown_path(run)}
    if stage.corruption.block > 1:
        dataset = cfg.data.dataset
        if dataset.get("format") is None:
            words |= {"relay.start": dataset.get("path", "FOLDER"), "relay.start_subset": dataset.get("subset", "")}
        else:
            words |= {"relay.start": "FOLDER"}  # sample.py reads no other formats
        words |= {"relay.start_size": "" if dataset.get("random_crops") else "input"}
        words |= {"seeds": "0" if dataset.get("random_crops") else f"0-{min(len(trained.names), 16) - 1}"}
    elif stage.info.text is not None:
        words |= {"prompt": " ".join(next(filter(None, trained.captions))[0].split())[:LONGEST_PROMPT]}
    if stage.info.text is not None and (path := cfg.text.get("path")) is not None and not Path(path).is_dir():
        words |= {"relay.text_path": path}  # a checkpoint alone loads no name on the Hub
    words |= {"trusted": f"[{','.join(cfg.trusted)}]" if cfg.trusted else ""}
    return " ".join(["python sample.py", *(override(key, str(value)) for key, value in words.items() if value)])


def _announce(
    cfg: DictConfig,
    trainer: L.Trainer,
    stage: DiffusionStage,
    data: ImageDataModule,
    start: Start,
    initial: str,
) -> None:
    """Record the run in its directory and loggers; print its start."""
    if not trainer.fast_dev_run:  # type: ignore[attr-defined]
        write_text(Path(cfg.run_dir) / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))
    settings, revision = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True)), git_revision()
    for logger in trainer.loggers:
        if hasattr(logger, "continue_run"):
            logger.continue_run(start.wandb)
        logger.log_hyperparams(settings | ({"git": revision} if revision else {}))
    parameters = sum(p.numel() for p in stage.denoiser.parameters())
    how = f"new run with the weights of {initial}" if initial else "new run"
    if start.checkpoint is not None:
        changed = ", ".join(f"{key} {before} -> {now}" for key, before, now in start.changed)
        how = f"continues {shown_path(start.checkpoint)}{f' with {changed}' if changed else ''}"
    images = f"{len(data.dataset.names):,} images" + (f" of {stage.num_classes} classes" if stage.num_classes else "")
    print(f"{shown_path(cfg.run_dir)}: {how}, {parameters:,} parameters, {images}", flush=True)
    if data.text is not None and data.missing_captions:
        print(f"note: {data.missing_captions:,} images have no caption; their prompt is empty", flush=True)
    if order := [key for key, _, _ in start.changed if key in DATA_ORDER]:
        print(f"note: {', '.join(order)} changed, so the order of the images changes", flush=True)
    report_slow_settings(trainer.strategy.root_device, {"network.channels_last": stage.denoiser.network})
