"""Where the numbers of a run go: a CSV file that grows over all its continuations.

Weights & Biases is in wandb.py, which only `logger=wandb` imports: loading it takes seconds.
"""

from relay_diffusion.training.loggers.metrics_csv import MetricsCSV
from relay_diffusion.training.loggers.rows import last_step, logged_row, send_row

__all__ = ["MetricsCSV", "last_step", "logged_row", "send_row"]
