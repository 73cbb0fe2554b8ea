"""Checkpoints every so many images, never half-written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.callbacks.every import Every
from relay_diffusion.checkpoint import LAST
from relay_diffusion.stage import DiffusionStage


class Checkpoints(Callback):
    """Writes `directory`/last.ckpt every `every_n_images` and at the end; older ones are kept under their count.

    `keep`: how many earlier checkpoints (images-000128000.ckpt, ...) stay beside the last one; 0 keeps none.
    """

    def __init__(self, directory: str, every_n_images: int, keep: int = 0) -> None:
        self.directory, self.keep = Path(directory), keep
        self._every = Every(every_n_images)
        self._saved = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: ARG002
        """Count from where training starts."""
        assert isinstance(pl_module, DiffusionStage)
        self._every.start(pl_module.images_seen)
        self._saved = pl_module.images_seen

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:  # noqa: ARG002
        """Save when due."""
        assert isinstance(pl_module, DiffusionStage)
        if self._every(pl_module.images_seen):
            self._save(trainer, pl_module.images_seen)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the end of training, unless that was just done."""
        assert isinstance(pl_module, DiffusionStage)
        if self._saved != pl_module.images_seen:
            self._save(trainer, pl_module.images_seen)

    def _save(self, trainer: L.Trainer, images_seen: int) -> None:
        last = self.directory / LAST
        temporary = self.directory / f".{LAST}.writing"
        trainer.save_checkpoint(temporary)  # on all ranks: Lightning lets rank 0 write
        if trainer.is_global_zero:
            if last.exists() and self.keep:
                kept = self.directory / f"images-{self._saved:012d}.ckpt"
                kept.unlink(missing_ok=True)
                kept.hardlink_to(last)  # there is a last.ckpt at every instant
                for old in sorted(self.directory.glob("images-*.ckpt"))[: -self.keep]:
                    old.unlink()
            temporary.replace(last)
        self._saved = images_seen
