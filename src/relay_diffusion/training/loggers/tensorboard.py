"""TensorBoard logger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger
from PIL.Image import Image

from relay_diffusion.utils.installed import require_library

METRICS = ("train/loss", "val/loss", "eval/fid", "relay/fid")  # columns of the HPARAMS tab


class TensorBoardRun(TensorBoardLogger):
    """Log to event files in `directory`/tensorboard on rank 0, over images seen.

    A resumed run adds a file. Raises UserError without the library tensorboard.
    """

    def __init__(self, directory: str | Path) -> None:
        require_library("logger=tensorboard", "tensorboard", "tensorboard")
        super().__init__(save_dir=directory, name="tensorboard", version="", default_hp_metric=False)

    @rank_zero_only
    def log_hyperparams(  # type: ignore[override]
        self,
        params: Mapping[str, Any],
        metrics: object = None,  # noqa: ARG002
        step: int | None = None,  # noqa: ARG002
    ) -> None:
        """Write the settings for the HPARAMS tab, which compares runs."""
        from torch.utils.tensorboard.summary import hparams  # needs tensorboard

        # the parent would log a value for every metric
        for summary in hparams(dict(_leaves(params)), dict.fromkeys(METRICS, 0.0)):
            self.experiment.file_writer.add_summary(summary)

    @rank_zero_only
    def log_image(self, key: str, images: list[Image], step: int) -> None:
        """Log pictures."""
        for number, image in enumerate(images):
            tag = key if len(images) == 1 else f"{key}/{number}"
            self.experiment.add_image(tag, np.asarray(image.convert("RGB")), step, dataformats="HWC")

    @rank_zero_only
    def log_image_table(self, key: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log a table, whose cells may be PIL images.

        The images are logged one by one, and the text table names them.
        """
        lines = [columns, ["---"] * len(columns)]
        for row, cells in enumerate(rows):
            texts = []
            for column, cell in zip(columns, cells, strict=True):
                tag = f"{key}/{row}_{column}"
                if isinstance(cell, Image):
                    self.log_image(tag, [cell], step)
                texts.append(tag if isinstance(cell, Image) else str(cell).replace("|", "\\|"))
            lines.append(texts)
        self.experiment.add_text(key, "\n".join(f"| {' | '.join(texts)} |" for texts in lines), step)


def _leaves(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str | int | float]]:
    """Yield the full key and the value of every setting."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, str | int | float) else str(value)
