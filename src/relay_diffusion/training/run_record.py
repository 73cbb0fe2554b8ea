"""Settings that a checkpoint records, and those that a resumed run changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, OmegaConf

from relay_diffusion.data.datamodule import ImageDataModule
from relay_diffusion.utils.differences import differences
from relay_diffusion.utils.messages import shorten

KEY = "run"  # of a checkpoint
LEGACY_KEY = "dealt"  # what older checkpoints have in its place
ABSENT = "not set"
LONGEST = 200  # characters of a value in messages
WITHOUT_EFFECT = (  # on what is trained; the number of devices is recorded as such
    "run_id", "run_dir", "resume", "init", "trainer.max_images", "trainer.devices", "trainer.num_nodes",
    "data.num_workers", "data.dataset.cache",
)  # fmt: skip
ACCUMULATE, LEGACY_ACCUMULATE = "trainer.accumulate_grad_batches", "data.accumulate"
DATA_ORDER = ("data.seed", "data.dataset.x_flip", "images")


class RunRecord(Callback):
    """Store the settings of the run in every checkpoint, as "run".

    config: the resolved settings. derived: the keys whose values refer to other keys. devices: ranks of the run.
    images: of the data set, without mirrored ones. wandb: what a WandbRun continues from.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.settings = {"config": OmegaConf.to_container(cfg, resolve=True), "derived": list(_derived(cfg))}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:  # noqa: ARG002
        """Add the record."""
        wandb = next((logger.run_record for logger in trainer.loggers if hasattr(logger, "run_record")), None)
        data = trainer.datamodule  # type: ignore[attr-defined]
        checkpoint[KEY] = self.of(trainer, data) | ({"wandb": wandb} if wandb else {})

    def of(self, trainer: L.Trainer, data: ImageDataModule) -> dict[str, Any]:
        """The settings, the number of ranks and the number of images."""
        return {**self.settings, "devices": trainer.world_size, "images": len(data.dataset.names)}


def changes(content: Mapping[str, Any], record: Mapping[str, Any], data: ImageDataModule) -> list[tuple[str, str, str]]:
    """(setting, before, now) of each setting in which a run differs from the checkpoint that it continues.

    content: of the checkpoint; `record`: of this run. Of an older checkpoint only the stage's settings, the batch
    and the data's path and seed are known.
    """
    found = _changes_of_record(content[KEY], record) if KEY in content else _changes_of_legacy(content, record, data)
    return [(key, _shown(before), _shown(now)) for key, before, now in found]


def changes_data_order(changed: list[tuple[str, str, str]]) -> list[str]:
    """The changed settings because of which images come in another order."""
    return [key for key, _, _ in changed if key in DATA_ORDER]


def _changes_of_record(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    derived = set(before.get("derived", [])) & set(now["derived"])  # what they refer to is compared itself
    for key, there, here in differences(_flat(before), _flat(now), absent=ABSENT):
        parents = {key[:end] for end in range(len(key) + 1) if key[end : end + 1] in (".", "")}
        if key not in WITHOUT_EFFECT and not parents & derived:
            yield key, there, here


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    config = dict(record.get("config", {}))
    data, trainer = config.get("data"), config.get("trainer")
    if isinstance(data, Mapping) and isinstance(trainer, Mapping) and "accumulate" in data:  # of an older checkpoint
        config["data"] = {name: value for name, value in data.items() if name != "accumulate"}
        config["trainer"] = {name: value for name, value in trainer.items() if name != "accumulate"}
        config["trainer"]["accumulate_grad_batches"] = data["accumulate"]
    return {**config, "devices": record.get("devices"), "images": record.get("images")}


def _changes_of_legacy(
    content: Mapping[str, Any], record: Mapping[str, Any], data: ImageDataModule
) -> Iterator[tuple[str, Any, Any]]:
    config = cast(dict[str, Any], record["config"])
    now = {
        "stage": config["stage"],
        "devices": record["devices"],
        "data.batch_size": data.batch_size,
        "data.dataset.path": str(data.dataset.path),
        "data.seed": data.seed,
        ACCUMULATE: config["trainer"].get("accumulate_grad_batches"),
        "images (mirrored ones too)": len(data.dataset),
    }
    before = {"stage": content["stage_config"]} | content.get(LEGACY_KEY, {})
    before["images (mirrored ones too)"] = before.pop("images", None)
    before[ACCUMULATE] = before.pop(LEGACY_ACCUMULATE, None)
    for key, there, here in differences(before, now):
        if there is not None and here is not None:  # what one of the versions does not know is no change
            yield key, there, here


def _derived(node: Any, prefix: str = "") -> Iterator[str]:
    """Keys whose values are written as references to others."""
    if not isinstance(node, DictConfig):
        return
    for name in map(str, node):
        key = f"{prefix}{name}"
        if OmegaConf.is_interpolation(node, name):
            yield key
        elif not OmegaConf.is_missing(node, name):
            yield from _derived(node[name], f"{key}.")


def _shown(value: Any) -> str:
    """A value on one line; of a component its class."""
    target = value.get("_target_") if isinstance(value, Mapping) else None
    return shorten(target.rpartition(".")[2] if isinstance(target, str) else value, LONGEST)
