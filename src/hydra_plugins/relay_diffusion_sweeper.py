"""The sweeper of train.py and sample.py. Hydra loads sweepers from the package hydra_plugins alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn
from omegaconf import OmegaConf

from relay_diffusion.cli.sweep import JobError, check_launcher
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import writing


class ReportingSweeper(BasicSweeper):
    """Hydra's own sweeper, which also runs what is left after a failure, and reports every job that failed."""

    def setup(self, **context: Any) -> None:
        """Create the launcher. Raises UserError if it cannot work here."""
        check_launcher(context["config"].hydra.launcher._target_)
        super().setup(**context)

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run a job for each combination of values. Ends the process with 2, or 1 for a bug, if any job fails."""
        assert self.hydra_context is not None
        assert self.config is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        overrides = parser.parse_overrides([*self._parse_config(), *arguments])
        values = {override.key_or_group: override for override in overrides}  # the last one counts
        same = ",".join(key for key, override in values.items() if not override.is_sweep_override())
        short_names = f"hydra.job.config.override_dirname.exclude_keys=[{same}]"  # a job is named by what it varies
        directory = Path(self.config.hydra.sweep.dir)
        with writing(directory):
            directory.mkdir(parents=True, exist_ok=True)
        output = OmegaConf.select(self.config, "hydra.launcher.submitit_folder")
        if output is not None:
            print(f"the jobs write what they print to {output}", flush=True)
        results: list[JobReturn] = []
        for batch in self.split_arguments(overrides, self.max_batch_size):
            jobs = [[short_names, *job] for job in batch]
            self.validate_batch_is_legal(jobs)
            results += self._launch(jobs, len(results))
        errors = [error for result in results if (error := _error(result)) is not None]
        if errors:
            for error in errors:
                error.show()
            names = "; ".join(error.job for error in errors)
            print(f"error: {len(errors)} of {len(results)} jobs failed: {names}", file=sys.stderr, flush=True)
            raise SystemExit(min(error.code for error in errors))
        return results

    def _launch(self, jobs: list[list[str]], first: int) -> Sequence[JobReturn]:
        assert self.launcher is not None
        try:
            return self.launcher.launch(jobs, initial_job_idx=first)
        except RuntimeError as error:
            if type(error).__name__ != "UncompletedJobError":  # of submitit, which need not be installed
                raise
            reason = " ".join(str(error).splitlines()[:2])
            raise UserError(
                f"a job of the sweep ended early, by a signal or out of memory: {reason}. Its output is beside that "
                "path; the other jobs go on, and their output says how they end"
            ) from None


def _error(result: JobReturn) -> JobError | None:
    """The error of a job; None if it did all of its work."""
    try:
        with redirect_stderr(StringIO()):  # where Hydra writes the overrides of a job that failed
            _ = result.return_value
    except JobError as error:
        return error
    return None
