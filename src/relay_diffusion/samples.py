"""Seeds and where their images are kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from relay_diffusion.errors import UserError
from relay_diffusion.files import write_text

FOLDER_SIZE = 1000  # images in one sub-folder


def parse_seeds(text: object) -> list[int]:
    """Seeds named by a text: 0-3,7 is [0, 1, 2, 3, 7].

    Raises UserError for anything else, and for seeds named twice.
    """
    parts = (
        [str(seed) for seed in text]
        if isinstance(text, Sequence) and not isinstance(text, str)
        else str(text).split(",")
    )
    seeds: list[int] = []
    for part in parts:
        first, dash, last = part.strip().partition("-")
        if not first.isdigit() or (dash and not last.isdigit()):
            raise UserError(f"seeds is {text!r}: give numbers and ranges, e.g. seeds=0-31 or seeds='0-7,12'")
        if dash and int(last) < int(first):
            raise UserError(f"seeds holds the range {part.strip()!r}, which runs backwards")
        seeds.extend(range(int(first), int(last if dash else first) + 1))
    if len(set(seeds)) != len(seeds):
        raise UserError(f"seeds is {text!r}: a seed is named twice")
    return seeds


def choose_labels(seeds: Sequence[int], chosen: str | int | None, num_classes: int, names: Sequence[str]) -> list[int]:
    """The class of every seed: one class by name or number, or (null) all in turn by seed; -1 without classes.

    Raises UserError for a class that the model does not know.
    """
    if chosen is None:
        return [seed % num_classes if num_classes else -1 for seed in seeds]
    if not num_classes:
        raise UserError(f"class={chosen} was given, but the model is unconditional: leave it out (class=null)")
    if str(chosen) in names:
        return [list(names).index(str(chosen))] * len(seeds)
    if str(chosen).isdigit() and int(chosen) < num_classes:
        return [int(chosen)] * len(seeds)
    known = ", ".join(names) if names else f"0 to {num_classes - 1}"
    raise UserError(f"class={chosen} is not known to the model; it knows {known}")


class SeedDataModule(L.LightningDataModule):
    """(seed, label) pairs dealt out to the devices in turn: every pair once, none twice.

    `batch_size`: images at once on one device.
    """

    def __init__(self, seeds: Sequence[int], labels: Sequence[int], batch_size: int) -> None:
        super().__init__()
        self.seeds, self.labels, self.batch_size = list(seeds), list(labels), batch_size

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """This device's share."""
        assert self.trainer is not None
        mine = slice(self.trainer.global_rank, None, self.trainer.world_size)
        pairs = TensorDataset(torch.tensor(self.seeds[mine]), torch.tensor(self.labels[mine]))
        return DataLoader(pairs, batch_size=self.batch_size)


class ImageFolder:
    """A folder of sampled images, one PNG a seed, that an interrupted run continues.

    `settings` (what determines the images) are kept beside them. Raises UserError if the folder already
    holds images of other settings.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self._settings = json.dumps(settings, indent=1, sort_keys=True, default=str)
        known = self.folder / "settings.json"
        if known.exists() and known.read_text() != self._settings:
            raise UserError(f"{self.folder} holds images of other settings (settings.json): choose another output")

    def begin(self) -> None:
        """Create the folder and note the settings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "settings.json", self._settings)

    def path(self, seed: int) -> Path:
        """Where the image of a seed lies."""
        return self.folder / f"{seed // FOLDER_SIZE * FOLDER_SIZE:08d}" / f"seed{seed:08d}.png"

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Seeds without an image so far."""
        return [seed for seed in seeds if not self.path(seed).exists()]
