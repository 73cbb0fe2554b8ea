"""Checkpoints every so many images, never half-written."""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.callbacks.every import Every
from relay_diffusion.checkpoint import KEPT, LAST
from relay_diffusion.errors import UserError
from relay_diffusion.files import sync, whole_file, write_text
from relay_diffusion.stage import DiffusionStage


class Checkpoints(Callback):
    """Writes `directory`/last.ckpt every `every_n_images` and at the end; older ones are kept under their count.

    `keep`: how many earlier checkpoints (images-000128000.ckpt, ...) stay beside the last one; 0 keeps none.
    `upload`: also hand each one to the loggers that take files, as a "model".
    A checkpoint is on the disk before it takes the place of the one before: whenever the machine fails, one is whole.
    Raises UserError if it cannot be written; the one before stays.
    """

    def __init__(self, directory: str, every_n_images: int, keep: int = 0, upload: bool = False) -> None:
        self.directory, self.keep, self.upload = Path(directory), keep, upload
        self._every = Every(every_n_images)
        self._saved = -1
        self._last_is_whole = False  # one that could not be read is not kept

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:  # noqa: ARG002
        """Find out before the work whether the directory can be written to."""
        if trainer.is_global_zero:
            write_text(self.directory / ".probe", "")
            (self.directory / ".probe").unlink()
            (self.directory / f".{LAST}.writing").unlink(missing_ok=True)  # of a run that was killed
            with suppress(OSError):
                self.directory.rmdir()  # an empty one is of no use if the run goes no further

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Count from where training starts."""
        start = trainer.ckpt_path
        self._last_is_whole = start is not None and Path(start).resolve() == (self.directory / LAST).resolve()
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
        last, temporary = self.directory / LAST, self.directory / f".{LAST}.writing"
        try:
            trainer.save_checkpoint(temporary)  # on all ranks: Lightning lets rank 0 write
            if trainer.is_global_zero:
                sync(temporary)
                if self._last_is_whole and self.keep:
                    kept = self.directory / f"images-{self._saved:012d}.ckpt"
                    _keep(last, kept)
                    for old in sorted(self.directory.glob(KEPT))[: -self.keep]:
                        old.unlink()
                temporary.replace(last)
                sync(self.directory)
                self._last_is_whole = True
        except (OSError, UserError) as error:
            temporary.unlink(missing_ok=True)
            intact = f"the checkpoint of {self._saved:,} images is intact" if last.exists() else "there is none yet"
            raise UserError(f"{last} cannot be written after {images_seen:,} images ({error}); {intact}") from None
        for logger in trainer.loggers if self.upload and trainer.is_global_zero else []:
            if hasattr(logger, "log_file"):
                logger.log_file(last, "model", images_seen)
        self._saved = images_seen


def _keep(last: Path, kept: Path) -> None:
    """Give a file a second name, so that there is a last.ckpt at every instant."""
    kept.unlink(missing_ok=True)
    try:
        kept.hardlink_to(last)
    except OSError:  # some file systems have no links
        with whole_file(kept) as copy, last.open("rb") as file:
            shutil.copyfileobj(file, copy)
