"""Encoded captions in training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import lightning as L

from relay_diffusion.data.datamodule import evenly_spaced_captions
from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.diffusion.text_states import TextStates
from relay_diffusion.models.stage import DiffusionStage
from relay_diffusion.text import CachedEncoder
from relay_diffusion.utils.distributed import on_rank_zero


def encode_captions(trainer: L.Trainer, text: CachedEncoder, datasets: Iterable[ImageDataset]) -> None:
    """Encode all captions of datasets, on the device of rank 0 (collective).

    The other ranks then read the cache. The weights of the encoder do not stay in memory. Raises UserError on all ranks
    if rank 0 does.
    """
    captions = {caption for data in datasets for some in data.captions for caption in some}

    def encode() -> None:
        text.encoder.to(trainer.strategy.root_device)
        text.prepare(captions)
        text.encoder.unload()

    on_rank_zero(trainer, encode)
    if not trainer.is_global_zero:
        text.prepare(captions, show_progress=False)
        text.encoder.unload()


def text_of_images(
    trainer: L.Trainer, stage: DiffusionStage, dataset: ImageDataset, numbers: Sequence[int], count: int
) -> TextStates | None:
    """Return encoded captions of evenly spaced images.

    numbers: which of `count` evenly spaced images. The caption of an image is always the same one. None without text.
    """
    text: CachedEncoder | None = getattr(trainer.datamodule, "text", None)  # type: ignore[attr-defined]
    if text is None or not stage.text_dim:
        return None
    return text.lookup(evenly_spaced_captions(dataset, numbers, count))
