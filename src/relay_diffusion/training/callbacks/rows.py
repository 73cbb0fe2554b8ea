"""Log one row of metrics, also to callbacks that monitor one of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback

from relay_diffusion.errors import UserError
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.training.loggers import send_row
from relay_diffusion.utils.messages import did_you_mean


def log_row(
    trainer: L.Trainer, stage: DiffusionStage, group: str, values: Mapping[str, float], again: bool = False
) -> None:
    """Log values as `group`/... at the images seen; they become `trainer.callback_metrics` too.

    Callbacks whose `monitor` is one of them (Lightning's EarlyStopping, our Checkpoints) get `on_validation_end`: the
    stream of images has no epochs at whose end they could look. Call it on all ranks, from on_train_batch_end or
    on_train_epoch_end. again: the loggers have this row from before the run was resumed.
    """
    if not again:
        send_row(trainer.loggers, group, values, stage.images_seen)
    row = {f"{group}/{key}": float(value) for key, value in values.items()}
    stage.log_dict(row, logger=False, batch_size=1)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if getattr(callback, "monitor", None) in row:
            callback.on_validation_end(trainer, stage)


OWN = ("relay_diffusion.", "lightning.")  # packages whose callbacks say in `logged` what they log


def check_monitors(callbacks: Sequence[Callback]) -> None:
    """Raise UserError if a callback monitors a metric that none of them logs.

    A callback from elsewhere may log anything.
    """
    known = [name for callback in callbacks for name in getattr(callback, "logged", ())]
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        if name is None or name in known or not all(type(c).__module__.startswith(OWN) for c in callbacks):
            continue
        option = getattr(callback, "monitor_option", f"monitor of {type(callback).__name__}")
        meant = did_you_mean(str(name), known, f"; logged are {', '.join(known) or 'no metrics'}")
        raise UserError(
            f"{option}={name}: no callback logs it{meant} "
            "(callbacks=evaluated logs eval/fid, callbacks=validation logs val/loss)"
        )
