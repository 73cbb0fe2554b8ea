"""A run on Weights & Biases whose x-axis is images seen."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from PIL import Image

from relay_diffusion.errors import UserError
from relay_diffusion.training.loggers.metrics_csv import STEP
from relay_diffusion.utils.files import json_text, write_text
from relay_diffusion.utils.messages import printable

LONGEST = 64  # characters of an id
FILE = "wandb_run.json"  # in the run's directory: what the W&B run continues from


class WandbRun(Logger):
    """Sends metrics, the config, pictures and files to a run of `project`; rank 0 does.

    run_id: names a new W&B run; a continued one keeps its id, whatever `run_id` is. directory: of the run; it holds
    the id, and wandb/ the local files. offline: no network; `wandb sync` sends it later.
    Continuing a run continues its curves: W&B's step is images seen too, so the parts of a run that was continued
    offline fit together when they are synced. What is logged at one amount of images becomes one row, sent when the
    next begins.
    """

    def __init__(self, project: str, run_id: str, directory: str | Path, offline: bool = False) -> None:
        super().__init__()
        self.project, self.directory, self.offline = project, Path(directory), offline
        self._new_id, self._id = _valid_id(run_id), ""
        self._run: Any = None

    def continue_run(self, stored: Mapping[str, str] | None = None) -> None:
        """Choose the W&B run: that of the directory, else the one `stored` in its checkpoint, else a new one."""
        self._id = self._continued(self._noted()) or self._continued(stored) or self._new_id

    def _noted(self) -> Mapping[str, str] | None:
        try:
            record = json.loads((self.directory / FILE).read_text(encoding="utf-8"))
            if not isinstance(record, dict) or not all(isinstance(value, str) for value in record.values()):
                raise TypeError
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):
            raise UserError(f"{self.directory / FILE} cannot be read: delete it for a new W&B run") from None
        return record

    def _continued(self, record: Mapping[str, str] | None) -> str | None:
        """The id of a record, unless its run has another directory: then this one is a copy, a run of its own."""
        if record is None or not {"id", "directory"} <= record.keys():
            return None
        original = Path(record["directory"])
        try:
            copied = json.loads((original / FILE).read_text(encoding="utf-8"))["id"] == record["id"]
            copied = copied and not (self.directory.exists() and original.samefile(self.directory))
        except (OSError, ValueError, LookupError, TypeError):
            copied = False  # it was moved
        if copied:
            print(f"note: {self.directory} is a copy of {printable(original)}: it becomes a W&B run of its own")
        return None if copied else record["id"]

    @property
    def run_record(self) -> dict[str, str]:
        """What a checkpoint stores, for `continue_run`."""
        return {"id": self.version, "directory": str(self.directory.absolute())}

    @property
    def name(self) -> str:
        """The project."""
        return self.project

    @property
    def version(self) -> str:
        """The run's id."""
        return self._id or self._new_id

    @property
    def save_dir(self) -> str:
        """Where W&B's local files are."""
        return str(self.directory)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The wandb run; begun when it is first needed."""
        if self._run is None:
            if not self._id:
                self.continue_run()
            self.directory.mkdir(parents=True, exist_ok=True)
            write_text(self.directory / FILE, json_text(self.run_record))
            self._run = wandb.init(
                project=self.project,
                id=self.version,
                name=self.version,
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
        artifact = wandb.Artifact(self.version, type=kind, metadata={STEP: step})
        artifact.add_file(str(path))
        self.experiment.log_artifact(artifact, aliases=["latest", f"images-{step}"])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, so that the next one in this process is another."""
        if self._run is not None:
            self._run.finish(exit_code=0 if status == "success" else 1)
            self._run = None


def _valid_id(run_id: str) -> str:
    """`run_id` as W&B accepts it for runs and artifacts; one that has to change gets a checksum, to stay unique."""
    valid = re.sub(r"[^\w.-]", "-", run_id, flags=re.ASCII)
    if valid == run_id and len(run_id) <= LONGEST:
        return run_id
    return f"{valid[: LONGEST - 9]}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"
