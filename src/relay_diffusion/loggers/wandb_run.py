"""A run on Weights & Biases whose x-axis is images seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from PIL import Image

from relay_diffusion.loggers.metrics_csv import STEP


class WandbRun(Logger):
    """Sends metrics, the config, pictures and files to the run `run_id` of `project`; rank 0 does.

    Continuing a run continues its curves: W&B's step is images seen too, so the parts of a run that was continued
    offline fit together when they are synced. What is logged at one amount of images becomes one row, sent when the
    next begins. `directory`/wandb holds the local files. `offline`: no network; `wandb sync` sends it later.
    """

    def __init__(self, project: str, run_id: str, directory: str | Path, offline: bool = False) -> None:
        super().__init__()
        self.project, self.run_id, self.directory, self.offline = project, run_id, Path(directory), offline
        self._run: Any = None

    @property
    def name(self) -> str:
        """The project."""
        return self.project

    @property
    def version(self) -> str:
        """The run's id."""
        return self.run_id

    @property
    def save_dir(self) -> str:
        """Where W&B's local files are."""
        return str(self.directory)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run; begun when it is first needed."""
        if self._run is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._run = wandb.init(
                project=self.project,
                id=self.run_id,
                name=self.run_id,
                dir=str(self.directory),
                resume="allow",
                mode="offline" if self.offline else None,
            )
            self._run.define_metric(STEP, hidden=True)
            self._run.define_metric("*", step_metric=STEP)
        return self._run

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log at `step` images seen."""
        assert step is not None, "a row needs its images seen"
        self.experiment.log({**metrics, STEP: step}, step=step)

    @rank_zero_only
    def log_hyperparams(self, params: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Take nested plain values into the run's config."""
        self.experiment.config.update(dict(params), allow_val_change=True)

    @rank_zero_only
    def log_image(self, key: str, images: Sequence[Image.Image], step: int) -> None:
        """Log pictures at `step` images seen."""
        self.log_metrics({key: [wandb.Image(image) for image in images]}, step)

    @rank_zero_only
    def log_file(self, path: Path, kind: str, step: int) -> None:
        """Keep a file as a new version of the run's artifact of type `kind`, which has the run's id as its name."""
        artifact = wandb.Artifact(self.run_id, type=kind, metadata={STEP: step})
        artifact.add_file(str(path))
        self.experiment.log_artifact(artifact, aliases=["latest", f"images-{step}"])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, so that the next one in this process is another."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run = None
