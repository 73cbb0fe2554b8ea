"""Start of a run: new, from initial weights, or from a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from relay_diffusion.checkpoints.encoders import check_same_encoder
from relay_diffusion.checkpoints.loading import build_empty, read_checkpoint
from relay_diffusion.checkpoints.reading import (
    KEPT,
    LAST,
    check_fits,
    find_checkpoint,
    find_stage,
    read_stage,
    stored_weights,
    wandb_record,
)
from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.diffusion.augment import LABELS
from relay_diffusion.errors import UserError, prefix_errors
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.utils.messages import differences, first_difference, setting_text, shown_path

KEY = "run"  # key of the run's settings in a checkpoint
LONGEST = 200  # characters of a value in messages
WITHOUT_EFFECT = (  # settings without effect on the result; "devices" records the number of ranks
    "run_id", "run_dir", "resume", "init", "optimized_metric", "trainer.max_images", "trainer.devices",
    "trainer.num_nodes", "data.num_workers", "data.dataset.cache", "data.text_cache", "text.path",
)  # fmt: skip
DATA_ORDER = ("data.seed", "data.dataset.x_flip", "images")  # settings that change the order of the images


class RunRecord(Callback):
    """Store the settings of the run in every checkpoint, as "run".

    config: the resolved settings. derived: keys whose values are interpolations. devices: number of ranks.
    images: number of images in the dataset, without mirrored ones. wandb: the `run_record` of a WandbRun.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.settings = {"config": OmegaConf.to_container(cfg, resolve=True), "derived": list(_derived(cfg))}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Add the record to the checkpoint."""
        wandb = next((logger.run_record for logger in trainer.loggers if hasattr(logger, "run_record")), None)
        data = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint[KEY] = self.of(trainer, data) | ({"wandb": wandb} if wandb else {})

    def of(self, trainer: L.Trainer, data: ImageDataModule) -> dict[str, Any]:
        """Return the settings, the number of ranks and the number of images."""
        return {**self.settings, "devices": trainer.world_size, "images": len(data.dataset.names)}


def _derived(node: Any, prefix: str = "") -> Iterator[str]:
    """Yield the keys whose values are interpolations."""
    if not isinstance(node, DictConfig):
        return
    for name in map(str, node):
        key = f"{prefix}{name}"
        if OmegaConf.is_interpolation(node, name):
            yield key
        elif not OmegaConf.is_missing(node, name):
            yield from _derived(node[name], f"{key}.")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (setting, before, now) of each setting that a resumed run changes."""
    derived = set(before.get("derived", [])) & set(now["derived"])  # the keys that they refer to are compared
    found = []
    for key, old, new in differences(_flat(before), _flat(now)):
        parents = {key[:end] for end in range(len(key) + 1) if key[end : end + 1] in (".", "")}
        if key not in WITHOUT_EFFECT and not parents & derived:
            found.append((key, setting_text(old, LONGEST), setting_text(new, LONGEST)))
    return found


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    config = {"text": None, **record.get("config", {})}  # older checkpoints lack text and network.context_dim
    if isinstance(config.get("network"), Mapping):
        config["network"] = {"context_dim": 0, **config["network"]}
    data, trainer = config.get("data"), config.get("trainer")
    # older checkpoints have data.accumulate
    if isinstance(data, Mapping) and isinstance(trainer, Mapping) and "accumulate" in data:
        config["data"] = {name: value for name, value in data.items() if name != "accumulate"}
        config["trainer"] = {name: value for name, value in trainer.items() if name != "accumulate"}
        config["trainer"]["accumulate_grad_batches"] = data["accumulate"]
    return {**config, "devices": record.get("devices"), "images": record.get("images")}


@dataclass(frozen=True)
class Start:
    """Start of a run, decided on rank 0.

    checkpoint: the file to continue from; None for a new run. own: whether it belongs to this run, not to `resume`.
    changed: (setting, before, now) of each changed setting. wandb: the stored `run_record` of its WandbRun.
    """

    checkpoint: Path | None = None
    own: bool = False
    images_seen: int = 0
    changed: list[tuple[str, str, str]] = field(default_factory=list)
    wandb: dict[str, str] | None = None


def last_checkpoint(cfg: DictConfig) -> tuple[Path, dict[str, Any], bool] | None:
    """Find the checkpoint to continue from, in the run directory or `resume`.

    Returns its path, its content, and whether it belongs to this run; None for a new run. A damaged checkpoint of this
    run is skipped with a warning. Raises UserError if the run has checkpoints but none can be read.
    """
    directory = OmegaConf.select(cfg, "callbacks.checkpoints.directory")
    own = [Path(directory) / LAST, *sorted(Path(directory).glob(KEPT), reverse=True)] if directory else []
    failures = []
    for path in own:
        if path.exists():
            try:
                return path, read_checkpoint(path, cfg.trusted), True
            except UserError as error:
                failures.append(str(error))
                print(f"warning: {error}; trying the previous checkpoint", file=sys.stderr, flush=True)
    if failures:
        raise UserError(f"no checkpoint in {directory} can be read ({failures[0]}): delete them to start a new run")
    if cfg.resume is None:
        return None
    with prefix_errors("resume"):
        return find_checkpoint(cfg.resume), read_checkpoint(cfg.resume, cfg.trusted), False


def check_same_stage(path: Path, checkpoint: dict[str, Any], stage_config: dict[str, Any]) -> None:
    """Require that a checkpoint has the same stage and optimizer.

    The learning rate and settings that affect only speed and memory may differ. Raises UserError.
    """
    stored, present = _fixed_settings(checkpoint["stage_config"]), _fixed_settings(stage_config)
    if stored != present:
        difference = first_difference(stored, present)
        raise UserError(
            f"{path} was written with different settings ({difference}): use another run_dir, or restore these settings"
        )


def check_same_classes(path: Path, checkpoint: dict[str, Any], data: ImageDataModule) -> None:
    """Require the same classes in the same order. Raises UserError.

    Other classes would change the meaning of labels.
    """
    stored, present = checkpoint.get("class_names", []), data.dataset.class_names
    if stored and present and stored != present:
        pairs = enumerate(zip_longest(stored, present))
        number, before, now = next((i, *pair) for i, pair in pairs if len({*pair}) > 1)
        raise UserError(
            f"{path} was trained on other classes than data.dataset.path={data.dataset.path} (class {number} was "
            f"{before}, is {now}): use another run_dir; init={path} starts from its weights"
        )


def _fixed_settings(stage_config: dict[str, Any]) -> dict[str, Any]:
    """Select stage settings that a resumed run may not change."""
    denoiser, corruption, optimizer = (stage_config.get(part) or {} for part in ("denoiser", "corruption", "optimizer"))
    # older files lack condition_channels, context_dim, and p_mean, p_std of a relay stage
    added = {"condition_channels": 0, "context_dim": 0}
    network = added | (denoiser.get("network") or {}) | {"checkpoint_levels": None}
    schedule = {"p_mean": -1.2, "p_std": 1.2} | (corruption.get("schedule") or {})
    return {
        "denoiser": denoiser | {"network": network},
        "corruption": corruption | {"schedule": schedule},
        "optimizer": optimizer | {"lr": None, "fused": None},
    }


def init_from(stage: DiffusionStage, path: str, trusted: Sequence[str] = ()) -> str:
    """Load initial weights: EMA weights, or raw ones without EMA.

    The class layer keeps its initial values if the stored classes are other ones, and so do the text layers if the
    stored text encoder is another one. Returns the file, and what kept its initial values, as text. trusted: as for
    load_stage. Raises UserError naming the file if its weights cannot be read, or the options to change if they are
    those of another network.
    """
    with prefix_errors("init"):
        file = find_stage(path)
        content = read_stage(file)
        weights = dict(stored_weights(content, "ema" if content.get("ema", {}).get("weights") else "raw", file))
    stored, present = (_network(config or {}) for config in (content["stage_config"], stage.info.config))
    shapes = partial(_shapes, file=file, trusted=trusted)
    state = stage.denoiser.state_dict()
    new, old = _taken(_layers(present, "num_classes", (1, 2), shapes), state, weights)
    names, notes = (content.get("class_names", []), stage.info.class_names), []
    if _shapes_of(old) != _shapes_of(new):
        notes.append(f"a new class layer ({stored.get('num_classes', 0)} classes there, {stage.num_classes} here)")
    elif all(names) and names[0] != names[1]:
        notes.append("a new class layer (other classes)")
    weights |= new if notes else old
    new, old = _taken(_layers(present, "context_dim", (0, 1), shapes), state, weights)
    encoders = [None if text is None else text["hash"] for text in (content.get("text"), stage.info.text)]
    kept = _shapes_of(old) == _shapes_of(new) and (None in encoders or encoders[0] == encoders[1])
    weights |= old if kept else new
    if not kept:
        there = "another text encoder" if old else "no text"
        notes.append(f"new text layers ({there} there)" if new else "without its text layers")
    try:
        check_fits(weights, stage.denoiser, file)
    except UserError:
        options = _options_to_change(stored, present, shapes)
        if not options:
            raise
        raise UserError(f"init={path}: has another network; use {' '.join(options)}, or remove init") from None
    stage.denoiser.load_state_dict(weights)
    return shown_path(file) + (f", but {' and '.join(notes)}" if notes else "")


def _network(stage_config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the network of a stage config.

    Empty if the config is damaged.
    """
    denoiser = stage_config.get("denoiser")
    network = denoiser.get("network") if isinstance(denoiser, Mapping) else None
    return network if isinstance(network, Mapping) else {}


def _shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def _shapes(network: Mapping[str, Any], file: Path, trusted: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that a network would have."""
    return _shapes_of(build_empty(network, file, trusted).state_dict())


def _layers(
    network: Mapping[str, Any], option: str, values: tuple[int, int], shapes: Callable[..., dict[str, Any]]
) -> list[str]:
    """Return the names of a denoiser's weights that depend on an option.

    They have other shapes with the second of `values` than with the first, or exist only then.
    """
    if option not in network:
        return []
    before, after = (shapes({**network, option: value}) for value in values)
    return [f"network.{name}" for name, shape in after.items() if before.get(name) != shape]


def _taken(
    names: Sequence[str], state: Mapping[str, Tensor], weights: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the named weights of a new and an old network.

    state: of the new one. weights: of the old one; the named ones are taken out.
    """
    new = {name: state[name] for name in names if name in state}
    return new, {name: weights.pop(name) for name in names if name in weights}


def _options_to_change(
    stored: Mapping[str, Any], present: Mapping[str, Any], shapes: Callable[[Mapping[str, Any]], Any]
) -> list[str]:
    """Return the options that must change for the stored weights.

    As KEY=VALUE. An option is among them if its stored value alone changes the shapes of the present network, or cannot
    be used.
    """
    now, options = shapes(present), []
    for name, value in stored.items():
        if name in ("num_classes", "context_dim") or value == present.get(name):
            continue
        try:
            decides = shapes({**present, name: value}) != now
        except UserError:
            decides = True
        if decides:
            options.append(_option(name, value))
    return options


def _option(name: str, value: Any) -> str:
    """Return the override that gives the network a setting.

    Settings that follow from another part of the config are set there.
    """
    if name == "augment_labels" and value in (0, LABELS):
        return "augment=edm" if value else "augment=none"
    key = {"resolution": "resolution", "image_channels": "data.dataset.channels"}.get(name, f"network.{name}")
    return f"{key}={setting_text(value, LONGEST).replace(' ', '')}"


def find_start(
    cfg: DictConfig, data: ImageDataModule, record: dict[str, Any], text: Mapping[str, Any] | None = None
) -> Start:
    """Decide where the run starts. Call on rank 0.

    `record`: settings from `RunRecord.of`. `text`: the text encoder, as in StageInfo. The content of the checkpoint is
    freed; Lightning reads it again. Raises UserError for a checkpoint that this run cannot continue.
    """
    found = last_checkpoint(cfg)
    if found is None:
        return Start()
    path, content, own = found
    check_same_encoder(content.get("text"), text, str(path))
    check_same_stage(path, content, record["config"]["stage"])
    check_same_classes(path, content, data)
    seen = content["images_seen"]
    if not own and seen >= cfg.trainer.max_images:
        raise UserError(
            f"resume={shown_path(path)} has seen {seen:,} images already: raise "
            f"trainer.max_images={cfg.trainer.max_images} to continue it"
        )
    stored = content.get(KEY, {})  # older checkpoints have none
    return Start(path, own, seen, changes(stored, record) if stored else [], wandb_record(content) if own else None)
