"""Write checkpoints periodically, unless training has diverged."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor

from relay_diffusion.checkpoints.reading import BEST, KEPT, LAST, read_stage
from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.callbacks.periodic import PeriodicCallback
from relay_diffusion.utils.files import atomic_write, sync, write_text

DIVERGED = "lower stage.optimizer.lr, raise stage.warmup_images, or set trainer.gradient_clip_val"


class Checkpoints(PeriodicCallback, Checkpoint):
    """Write `directory`/last.ckpt every `every_n_images` and at the end.

    `keep`: number of earlier checkpoints (images-000128000.ckpt, ...) to keep; 0 adds none and deletes none.
    `upload`: also send each checkpoint to loggers with `log_file`, as a "model".
    `best`: a logged metric, e.g. eval/fid; `directory`/best.ckpt then holds the state with its lowest value
    (`best_mode` max: its highest), and the value under the key "best". Each checkpoint is synced to the disk before it
    replaces the previous one, so a complete one always exists. No state is saved while loss or gradients are not
    finite; a periodic save then waits for the first finite step. Raises UserError if a checkpoint cannot be written, if
    weights, average or optimizer state are not finite, or if training ends in such steps; the previous checkpoint is
    kept. Lightning runs this callback last.
    """

    monitor_option = "callbacks.checkpoints.best"

    def __init__(
        self,
        directory: str,
        every_n_images: int,
        keep: int = 0,
        upload: bool = False,
        best: str | None = None,
        best_mode: str = "min",
    ) -> None:
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode={best_mode}: use min or max")
        if not keep >= 0:
            raise ValueError(f"keep={keep}: must be at least 0")
        if not every_n_images >= 1:
            raise ValueError(
                f"every_n_images={every_n_images}: must be at least 1; above trainer.max_images, only the end is saved"
            )
        super().__init__(every_n_images)
        self.directory, self.keep, self.upload = Path(directory), keep, upload
        self.monitor, self.best_mode = best, best_mode
        self._due = False
        self._saved, self._refused = -1, -1  # images seen at the last saved and the last unsaved state
        self._start: Path | None = None  # the checkpoint that training started from
        self._last_is_readable = False  # an unreadable checkpoint is not kept
        self._best: dict[str, Any] | None = None  # metric, mode, value, images_seen
        self._better: float | None = None  # value of the present state, if it is better
        self._measured = False  # whether the metric was ever logged

    def setup(self, trainer: L.Trainer, pl_module: DiffusionStage, stage: str) -> None:
        """Check before training that the directory is writable."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            write_text(self.directory / ".probe", "")
            (self.directory / ".probe").unlink()
            for name in (LAST, BEST):
                _temporary(self.directory / name).unlink(missing_ok=True)  # a killed run may have left it
            with suppress(OSError):
                self.directory.rmdir()  # no empty directory if the run fails before its first checkpoint

    def on_save_checkpoint(
        self,
        trainer: L.Trainer,
        pl_module: DiffusionStage,
        checkpoint: dict[str, Any],
    ) -> None:
        """Record the value of the best state so far."""
        if self._best is not None and self._best["images_seen"] == pl_module.images_seen:
            checkpoint["best"] = dict(self._best)

    def on_train_start(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Count from where training starts."""
        self._start = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
        self._last_is_readable = self._start is not None and self._start.resolve() == (self.directory / LAST).resolve()
        super().on_train_start(trainer, pl_module)
        self._saved = pl_module.images_seen
        pl_module.fit_state.kept_checkpoint = self.kept()
        if self.monitor is not None:
            stored = self._read_best() if trainer.is_global_zero else None
            self._best = trainer.strategy.broadcast(stored)

    def _read_best(self) -> dict[str, Any] | None:
        """Read the record of an earlier best.ckpt.

        Warns if it is damaged or belongs to another metric.
        """
        file = self.directory / BEST
        if not file.exists():
            return None
        try:
            best = read_stage(file).get("best")
            if not isinstance(best, dict) or not isinstance(best.get("value"), float):
                raise UserError(f"{file} has no record of its metric")
        except UserError as error:
            _warn(f"{error}; the next {self.monitor} replaces it")
            return None
        if (best.get("metric"), best.get("mode")) != (self.monitor, self.best_mode):
            _warn(f"{file} holds the best {best.get('metric')} ({best.get('mode')}); {self.monitor} replaces it")
            return None
        return best

    def on_validation_end(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Compare the last value of the monitored metric with the best one."""
        assert self.monitor is not None
        # all ranks take the value of rank 0, because speeds differ
        value: float = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        self._measured = True
        sign = 1 if self.best_mode == "min" else -1
        if math.isfinite(value) and (self._best is None or sign * value < sign * self._best["value"]):
            self._better = value

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: DiffusionStage, *args: Any) -> None:
        """Save when due, and at the end before other callbacks measure."""
        if trainer.fast_dev_run or pl_module.mid_accumulation:  # type: ignore[attr-defined]
            return
        self._due |= self.due(pl_module.images_seen)
        if self._due or trainer.should_stop:
            self.act(trainer, pl_module)
        self._save_best(trainer, pl_module)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: DiffusionStage) -> None:
        """Save the final state, again if it was measured since."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        signal = pl_module.fit_state.stop_signal
        # measurements after the last save changed callbacks that monitor them
        others = [c for c in trainer.callbacks if getattr(c, "monitor", None) is not None and c is not self]  # type: ignore[attr-defined]
        self.act(trainer, pl_module, again=bool(others) and not signal)
        self._save_best(trainer, pl_module)
        if self.monitor is not None and not self._measured and trainer.is_global_zero and not signal:
            _warn(f"{self.monitor_option}={self.monitor} was never logged: {self.directory / BEST} was not written")

    def act(self, trainer: L.Trainer, stage: DiffusionStage, again: bool = False) -> None:
        """Save the present state as last.ckpt, once unless `again`."""
        saved = stage.images_seen == self._saved
        if stage.images_seen == self._refused or (saved and not again):
            self._due = self._due and not saved
            return
        if not self._good(trainer, stage):
            self._refused = stage.images_seen
            return
        last = self.directory / LAST
        keeps = self._last_is_readable and self.keep and not saved
        kept = self.directory / f"images-{self._saved:012d}.ckpt" if keeps else None
        self._write(trainer, stage, last, kept)
        self._due, self._last_is_readable = False, True
        self._saved, self._refused = stage.images_seen, -1
        stage.fit_state.kept_checkpoint = self.kept()
        self._upload(trainer, stage, last)

    def _upload(self, trainer: L.Trainer, stage: DiffusionStage, file: Path) -> None:
        for logger in trainer.loggers if self.upload and trainer.is_global_zero else []:
            if hasattr(logger, "log_file"):
                logger.log_file(file, "model", stage.images_seen)

    def _save_best(self, trainer: L.Trainer, stage: DiffusionStage) -> None:
        value, self._better = self._better, None
        if value is None or not self._good(trainer, stage):
            return
        self._best = {
            "metric": self.monitor,
            "mode": self.best_mode,
            "value": value,
            "images_seen": stage.images_seen,
        }
        self._write(trainer, stage, self.directory / BEST)
        self._upload(trainer, stage, self.directory / BEST)

    def _good(self, trainer: L.Trainer, stage: DiffusionStage) -> bool:
        """Return whether the state may replace a checkpoint.

        Raises UserError if training cannot continue from it.
        """
        nonfinite = trainer.strategy.broadcast(first_nonfinite_tensor(trainer, stage))  # rank 0 writes the checkpoint
        if nonfinite is not None:
            raise UserError(
                f"training has diverged: {nonfinite} is not finite after {stage.images_seen:,} images; "
                f"{self.kept()}: {DIVERGED}"
            )
        steps = stage.nonfinite_steps.now()
        if not steps:
            return True
        found = f"no finite loss, or no finite gradient, in the last {steps} steps of {stage.images_seen:,} images"
        if trainer.should_stop and not stage.fit_state.stop_signal:
            raise UserError(f"training has diverged, its end is not saved: {found}; {self.kept()}: {DIVERGED}")
        if self._refused < 0 and trainer.is_global_zero:
            _warn(f"not saved: {found}; {self.kept()}")
        return False

    def kept(self) -> str:
        """Describe the kept checkpoint if the present state is not saved."""
        if self._last_is_readable:
            return f"{self.directory / LAST} of {self._saved:,} images is kept"
        return "no checkpoint exists" if self._start is None else f"{self._start} is kept"

    def _write(self, trainer: L.Trainer, stage: DiffusionStage, file: Path, before: Path | None = None) -> None:
        """Write a checkpoint atomically; keep the present `file` as `before`."""
        temporary = _temporary(file)
        try:
            trainer.save_checkpoint(temporary)  # collective; rank 0 writes
            if trainer.is_global_zero:
                sync(temporary)
                if before is not None:
                    _keep(file, before)
                    for old in sorted(self.directory.glob(KEPT))[: -self.keep]:
                        old.unlink()
                temporary.replace(file)
                sync(self.directory)
        except (OSError, UserError) as error:
            temporary.unlink(missing_ok=True)
            intact = f"the checkpoint of {self._saved:,} images is intact" if file.exists() else "no checkpoint exists"
            raise UserError(
                f"{file} cannot be written after {stage.images_seen:,} images ({error}); {intact}"
            ) from None


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name}.writing")


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)


def _keep(last: Path, kept: Path) -> None:
    """Link or copy a file: a rename would leave no last.ckpt for a moment."""
    kept.unlink(missing_ok=True)
    try:
        kept.hardlink_to(last)
    except OSError:  # some file systems have no links
        with atomic_write(kept) as copy, last.open("rb") as file:
            shutil.copyfileobj(file, copy)


def first_nonfinite_tensor(trainer: L.Trainer, stage: DiffusionStage) -> str | None:
    """Name the first tensor with nan or infinity, if any.

    Checks weights, average and optimizer state. Waits for the device once.
    """
    tensors = [(name, tensor) for name, tensor in _state(trainer, stage) if tensor.is_floating_point()]
    finite = torch.stack([tensor.isfinite().all().to(stage.device) for _, tensor in tensors]).tolist()
    return next((name for (name, _), good in zip(tensors, finite, strict=True) if not good), None)


def _state(trainer: L.Trainer, stage: DiffusionStage) -> Iterator[tuple[str, Tensor]]:
    """Tensors of a checkpoint and their names in messages."""
    yield from ((f"weight {name}", tensor) for name, tensor in stage.state_dict().items())
    if stage.ema is not None:
        yield from ((f"EMA weight {name}", tensor) for name, tensor in stage.ema.weights.items())
    names: dict[Tensor, str] = {parameter: name for name, parameter in stage.named_parameters()}
    for optimizer in trainer.optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"optimizer state {key} of {names.get(parameter, 'a parameter')}", value
