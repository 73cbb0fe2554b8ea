"""Weights & Biases logger."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import wandb
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from PIL.Image import Image

from relay_diffusion.checkpoints.reading import is_run_record
from relay_diffusion.errors import UserError
from relay_diffusion.training.loggers.metrics_csv import STEP
from relay_diffusion.utils.files import json_text, write_text
from relay_diffusion.utils.messages import shorten

LONGEST = 64  # characters of an id, and of a tag
LONGEST_NAME = 128  # characters of other names
RESERVED = frozenset("/\\#?%:")  # characters that names of projects and entities must not have
PROJECT = "relay-diffusion"  # as in conf/logger/wandb.yaml
FILE = "wandb_run.json"  # in the run directory: id of the W&B run, for a resume


class WandbRun(WandbLogger):
    """Log to a W&B run on rank 0, over images seen.

    run_id: id of a new W&B run; a resumed one keeps its id. directory: the run directory; it holds the id and the
    local files in wandb/. offline: no network; `wandb sync` uploads the run later. entity: user or team; None: the
    default of the account. name: shown in W&B; None: the id. group, tags: as of wandb.init.
    The W&B step is the number of images seen, so synced parts of a run that was resumed offline fit together. Metrics
    logged at one number of images become one row, sent when the next row starts.
    Raises ValueError for a name that W&B refuses.
    """

    def __init__(
        self,
        project: str,
        run_id: str,
        directory: str | Path,
        offline: bool = False,
        entity: str | None = None,
        name: str | None = None,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        given = {"project": project, "entity": entity, "name": name, "group": group}
        names = {option: None if value is None else str(value) for option, value in given.items()}  # YAML reads numbers
        labels = [str(tag) for tag in tags]
        _check_names(names, labels)
        # The parent's `offline` would set an environment variable for the whole process.
        super().__init__(save_dir=directory, mode="offline" if offline else None, tags=labels or None)
        self._wandb_init |= names
        self._project = names["project"]
        self.directory = Path(directory)
        self._new_id, self._id = _valid_id(run_id), None
        self._joined: Mapping[str, str] | None = None  # record of a run of another directory

    @rank_zero_only
    def check_login(self) -> None:
        """Verify the account with the server, before work starts.

        Offline there is nothing to check. Raises UserError.
        """
        if self._wandb_init["mode"] != "offline" and os.environ.get("WANDB_MODE", "online") == "online":
            with _user_errors():
                wandb.login(verify=True)

    def continue_run(self, stored: Mapping[str, str] | None = None) -> None:
        """Continue the W&B run of the directory or of `stored`.

        Without either, start a new one. stored: the `run_record` in the checkpoint.
        """
        self._id = self._continued(read_record(self.directory)) or self._continued(stored) or self._new_id

    def _continued(self, record: Mapping[str, str] | None) -> str | None:
        """Return the id of a record; None in a copied directory."""
        if record is None:
            return None
        original = Path(record["directory"])
        try:
            copied = json.loads((original / FILE).read_text(encoding="utf-8"))["id"] == record["id"]
            copied = copied and not (self.directory.exists() and original.samefile(self.directory))
        except (OSError, ValueError, LookupError, TypeError):
            copied = False  # the directory was moved
        if copied:
            print(f"note: {self.directory} is a copy of {shorten(original)}: it becomes a separate W&B run")
        return None if copied else record["id"]

    def join(self, record: Mapping[str, str]) -> None:
        """Log to the W&B run of `record` after its last row.

        Its name, group, tags, settings and console log stay; a note names options that are not used. record: a
        `run_record`; older ones have no project.
        """
        self._id, self._joined = record["id"], record
        own = ("name", "group", "tags")
        moved = [key for key in ("project", "entity") if self._wandb_init[key] not in (None, PROJECT, record.get(key))]
        unused = [key for key in own if self._wandb_init[key]] + [key for key in moved if key in record]
        if unused:
            options = ", ".join(f"logger.wandb.{key}={shorten(self._wandb_init[key])}" for key in unused)
            rank_zero_only(print)(f"note: not used, as the W&B run {self._id} has its own: {options}")
        self._wandb_init |= dict.fromkeys(own)
        self._wandb_init |= {key: record[key] for key in ("project", "entity") if key in record}
        # W&B would replace the log and the description of the host that trained
        self._wandb_init["settings"] = wandb.Settings(console="off", x_disable_meta=True, x_disable_stats=True)

    @property
    def run_record(self) -> dict[str, str]:
        """Return the record for `continue_run` that checkpoints store."""
        if self._joined is not None:
            return dict(self._joined)
        place = {key: str(self._wandb_init[key]) for key in ("project", "entity") if self._wandb_init[key]}
        return {"id": self.version, "directory": str(self.directory.absolute())} | place

    @property
    def version(self) -> str:
        """Return the id of the W&B run."""
        return self._id or self._new_id

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """Return the wandb run; the first use starts it."""
        if self._experiment is None:
            if self._id is None:
                self.continue_run()
            self.directory.mkdir(parents=True, exist_ok=True)
            before = self.run_record
            write_text(self.directory / FILE, json_text(before))
            # The parent would use the trainer's steps as the x-axis.
            name = self._wandb_init["name"] or (self.version if self._joined is None else None)
            with _user_errors():
                self._experiment = wandb.init(**self._wandb_init | {"id": self.version, "name": name})
            for key in ("project", "entity"):  # W&B chooses the account's entity, and a sweep has its own
                self._wandb_init[key] = getattr(self._experiment, key) or self._wandb_init[key]
            if self.run_record != before:
                write_text(self.directory / FILE, json_text(self.run_record))
            self._experiment.define_metric(STEP, hidden=True)
            self._experiment.define_metric("*", step_metric=STEP)
        return self._experiment

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log at `step` images seen."""
        assert step is not None, "a row needs its images seen"
        row = step if self._joined is None else max(step + 1, self.experiment.step)  # W&B drops rows before the last
        self.experiment.log({**metrics, STEP: step}, step=row)

    @rank_zero_only
    def log_image_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log a table, whose cells may be PIL images."""
        cells = [[wandb.Image(cell) if isinstance(cell, Image) else cell for cell in row] for row in rows]
        self.log_table(key, columns, cells, step=step)

    @rank_zero_only
    def log_file(self, path: Path, kind: str, step: int) -> None:
        """Upload a file as a new version of the run's artifact.

        Its aliases are images-STEP and the name of the file, such as last or best. W&B adds latest.
        """
        artifact = wandb.Artifact(self.version, type=kind, metadata={STEP: step})
        artifact.add_file(str(path))
        self.experiment.log_artifact(artifact, aliases=[path.stem, f"images-{step}"])

    @rank_zero_only
    def log_evaluation(self, path: Path, models: Mapping[str, tuple[Mapping[str, str], int]], step: int) -> None:
        """Upload metrics as an artifact, with the artifacts of models as inputs.

        models: by name, the `run_record` and the images seen of each. Offline, W&B stores no inputs; the metadata of
        the artifact names them.
        """
        addresses = {
            name: f"{record.get('project', self.name)}/{record['id']}:images-{seen}"
            for name, (record, seen) in models.items()
        }
        for name, (record, _) in models.items() if not self.experiment.offline else ():
            address = "/".join(filter(None, [record.get("entity"), addresses[name]]))
            try:
                self.experiment.use_artifact(address, type="model")
            except (ValueError, wandb.Error):
                print(
                    f"note: W&B has no artifact {address}, so {path.name} has no link to {name}: train with "
                    "callbacks.checkpoints.upload=true",
                    flush=True,
                )
        metadata = {STEP: step, "models": addresses}
        artifact = wandb.Artifact(f"{self.version}-evaluation", type="evaluation", metadata=metadata)
        artifact.add_file(str(path))
        self.experiment.log_artifact(artifact)

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Finish the W&B run: the next run in this process needs another."""
        if self._experiment is not None:
            self._experiment.finish(exit_code=0 if status == "success" else 1)
            self._experiment = None


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn errors of W&B into a UserError with a remedy."""
    try:
        yield
    except wandb.Error as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(
            f"W&B: {reason}: use logger.wandb.offline=true (or WANDB_MODE=offline), run `wandb login`, or correct "
            "WANDB_API_KEY"
        ) from None


def read_record(directory: Path) -> dict[str, str] | None:
    """Read the `run_record` of a directory; None without one."""
    try:
        record = json.loads((directory / FILE).read_text(encoding="utf-8"))
        if not is_run_record(record):
            raise ValueError
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        raise UserError(f"{directory / FILE} cannot be read: delete it for a new W&B run") from None
    return record


def _check_names(names: Mapping[str, str | None], tags: Sequence[str]) -> None:
    """Raise ValueError for a name that W&B refuses, before it does."""
    for option, name in names.items():
        if name is not None and not 1 <= len(name) <= LONGEST_NAME:
            raise ValueError(f"{option}={shorten(name)}: must have 1 to {LONGEST_NAME} characters")
        if option in ("project", "entity") and (found := RESERVED & {*(name or "")}):
            raise ValueError(f"{option}={shorten(name)}: must not contain {min(found)}; use another name")
    for tag in tags:
        if not 1 <= len(tag) <= LONGEST:
            raise ValueError(f"tags={shorten(tags)}: each tag must have 1 to {LONGEST} characters")


def _valid_id(run_id: str) -> str:
    """Return `run_id` with valid characters for W&B.

    A changed id gets a checksum to stay unique.
    """
    valid = re.sub(r"[^\w.-]", "-", run_id, flags=re.ASCII)
    if valid == run_id and len(run_id) <= LONGEST:
        return run_id
    return f"{valid[: LONGEST - 9]}-{hashlib.sha256(run_id.encode()).hexdigest()[:8]}"
