"""Callbacks of training."""

from relay_diffusion.training.callbacks.checkpoints import Checkpoints
from relay_diffusion.training.callbacks.evaluation import PeriodicEvaluation
from relay_diffusion.training.callbacks.periodic import PeriodicMeasurement, log_row
from relay_diffusion.training.callbacks.preemption import Preemption
from relay_diffusion.training.callbacks.progress import TrainingProgress
from relay_diffusion.training.callbacks.sample_grid import SampleGrid
from relay_diffusion.training.callbacks.training_log import TrainingLog
from relay_diffusion.training.callbacks.validation import Validation
from relay_diffusion.training.ema import EMA

__all__ = [
    "EMA",
    "Checkpoints",
    "PeriodicEvaluation",
    "PeriodicMeasurement",
    "Preemption",
    "SampleGrid",
    "TrainingLog",
    "TrainingProgress",
    "Validation",
    "log_row",
]
