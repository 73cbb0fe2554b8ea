"""Where the numbers of a run go: a CSV file that grows over all its continuations, and Weights & Biases."""

from relay_diffusion.loggers.metrics_csv import MetricsCSV
from relay_diffusion.loggers.rows import last_step, send_row
from relay_diffusion.loggers.wandb_run import WandbRun

__all__ = ["MetricsCSV", "WandbRun", "last_step", "send_row"]
