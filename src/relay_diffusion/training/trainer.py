"""Lightning's Trainer with amounts in images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning as L
from lightning.pytorch.callbacks import Callback, Checkpoint
from lightning.pytorch.loggers import Logger
from lightning.pytorch.profilers import AdvancedProfiler, Profiler, PyTorchProfiler, SimpleProfiler
from lightning.pytorch.strategies import Strategy

from relay_diffusion.errors import UserError
from relay_diffusion.training.callbacks.stopping import StopAtImages, StopIfDiverged, TimeLimit
from relay_diffusion.utils.messages import did_you_mean

OWN = ("relay_diffusion.", "lightning.")  # packages whose callbacks list their metrics in `logged`
PROFILERS: dict[str, type[Profiler]] = {
    "simple": SimpleProfiler,
    "advanced": AdvancedProfiler,
    "pytorch": PyTorchProfiler,
}


def training_limits(
    max_images: int,
    max_nonfinite_steps: int = 20,
    max_time: str | dict[str, int] | None = None,
    limit_train_batches: int | None = None,
    gradient_clip_val: float | None = None,
) -> list[Callback]:
    """Check the limits of `build_trainer`, and build the callbacks that end training.

    Raises ValueError that names the option.
    """
    if gradient_clip_val is not None and not gradient_clip_val >= 0:
        raise ValueError(f"gradient_clip_val={gradient_clip_val}: must be at least 0")
    limits: list[Callback] = [StopIfDiverged(max_nonfinite_steps), StopAtImages(max_images, limit_train_batches)]
    return limits if max_time is None else [*limits, TimeLimit(max_time)]


def build_trainer(
    max_images: int,
    accumulate_grad_batches: int = 1,
    accelerator: str = "auto",
    devices: int | str | Sequence[int] = 1,
    num_nodes: int = 1,
    strategy: str | Strategy = "auto",
    precision: str = "32-true",
    deterministic: bool = False,
    callbacks: Sequence[Callback] = (),
    logger: Sequence[Logger] = (),
    default_root_dir: str | None = None,
    max_nonfinite_steps: int = 20,
    gradient_clip_val: float | None = None,
    gradient_clip_algorithm: Literal["norm", "value"] = "norm",
    max_time: str | dict[str, int] | None = None,
    limit_train_batches: int | None = None,
    fast_dev_run: bool | int = False,
    profiler: Literal["simple", "advanced", "pytorch"] | None = None,
) -> L.Trainer:
    """Build a Trainer that stops once the stage has seen `max_images` images.

    Each step is `accumulate_grad_batches` micro-batches. Epochs, validation loops and Lightning's progress and
    checkpoint callbacks are off: the data is one endless stream, and our callbacks count images.
    max_nonfinite_steps: see StopIfDiverged. max_time: see TimeLimit. limit_train_batches: optimizer steps after which
    training ends. fast_dev_run: number of optimizer steps of a test without checkpoints and loggers. profiler:
    simple, advanced or pytorch; its report is written to `default_root_dir`.
    """
    limits = training_limits(max_images, max_nonfinite_steps, max_time, limit_train_batches, gradient_clip_val)
    callbacks = [*limits, *callbacks]  # limits first: the other callbacks read trainer.should_stop
    _check_monitors(callbacks)
    trainer = L.Trainer(
        max_steps=-1,
        max_epochs=-1,
        accumulate_grad_batches=accumulate_grad_batches,
        accelerator=accelerator,
        devices=devices if isinstance(devices, int | str) else list(devices),
        num_nodes=num_nodes,
        strategy=strategy,
        precision=precision,  # type: ignore[arg-type]  # Lightning lists the choices in its error
        deterministic=deterministic,
        benchmark=not deterministic,
        callbacks=callbacks,
        logger=list(logger),
        default_root_dir=default_root_dir,
        gradient_clip_val=gradient_clip_val,
        gradient_clip_algorithm=gradient_clip_algorithm,
        fast_dev_run=int(fast_dev_run) * accumulate_grad_batches,  # Lightning counts micro-batches
        profiler=None if profiler is None else PROFILERS[profiler](dirpath=default_root_dir, filename="profile"),
        use_distributed_sampler=False,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        # log_row calls monitoring callbacks, because the only epoch never ends
        check_val_every_n_epoch=None,
        val_check_interval=1,
    )
    # Lightning synchronizes at every step to detect SIGTERM; Preemption does not
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    return trainer


def _check_monitors(callbacks: Sequence[Callback]) -> None:
    for callback in callbacks:
        name = getattr(callback, "monitor", None)
        if name is not None:
            option = getattr(callback, "monitor_option", f"monitor of {type(callback).__name__}")
            check_logged(option, str(name), callbacks)


def check_logged(option: str, name: str, callbacks: Sequence[Callback]) -> None:
    """Raise UserError with `option` if no callback logs a metric.

    Callbacks of other packages may log any metric.
    """
    known = [metric for callback in callbacks for metric in getattr(callback, "logged", ())]
    if name in known or not all(type(callback).__module__.startswith(OWN) for callback in callbacks):
        return
    meant = did_you_mean(name, known, f"; logged are {', '.join(known) or 'no metrics'}")
    raise UserError(
        f"{option}={name}: no callback logs it{meant} "
        "(callbacks=evaluated logs eval/fid, callbacks=validation logs val/loss)"
    )
