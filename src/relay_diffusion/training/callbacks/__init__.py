"""Callbacks of training."""

from relay_diffusion.training.callbacks.checkpoints import Checkpoints
from relay_diffusion.training.callbacks.ema import EMA
from relay_diffusion.training.callbacks.evaluation import PeriodicEvaluation
from relay_diffusion.training.callbacks.periodic import PeriodicMeasurement, log_row
from relay_diffusion.training.callbacks.preemption import Preemption
from relay_diffusion.training.callbacks.progress import ImagesProgress
from relay_diffusion.training.callbacks.sample_grid import SampleGrid
from relay_diffusion.training.callbacks.training_log import TrainingLog
from relay_diffusion.training.callbacks.validation import Validation

__all__ = [
    "EMA",
    "Checkpoints",
    "ImagesProgress",
    "PeriodicEvaluation",
    "PeriodicMeasurement",
    "Preemption",
    "SampleGrid",
    "TrainingLog",
    "Validation",
    "log_row",
]
