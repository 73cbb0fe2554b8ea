"""What happens around training and sampling: averages, checkpoints, logs, pictures, measurement."""

from relay_diffusion.callbacks.checkpoints import Checkpoints
from relay_diffusion.callbacks.ema import EMA
from relay_diffusion.callbacks.evaluator import Evaluator
from relay_diffusion.callbacks.image_writer import ImageWriter
from relay_diffusion.callbacks.periodic import PeriodicMeasurement
from relay_diffusion.callbacks.periodic_evaluation import PeriodicEvaluation
from relay_diffusion.callbacks.preemption import Preemption
from relay_diffusion.callbacks.progress_bar import SamplingProgress, TrainingProgress
from relay_diffusion.callbacks.relay_picture import RelayPicture
from relay_diffusion.callbacks.rows import log_row
from relay_diffusion.callbacks.sample_grid import SampleGrid
from relay_diffusion.callbacks.training_log import TrainingLog
from relay_diffusion.callbacks.trajectory_picture import TrajectoryPicture
from relay_diffusion.callbacks.validation import Validation

__all__ = [
    "EMA",
    "Checkpoints",
    "Evaluator",
    "ImageWriter",
    "PeriodicEvaluation",
    "PeriodicMeasurement",
    "Preemption",
    "RelayPicture",
    "SampleGrid",
    "SamplingProgress",
    "TrainingLog",
    "TrainingProgress",
    "TrajectoryPicture",
    "Validation",
    "log_row",
]
