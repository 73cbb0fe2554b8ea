"""Batches of a plan, split over ranks.

Every rank needs at least one image: Lightning ends a rank without a batch early, and the others would wait for it. With
fewer images than ranks, several ranks make the same image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, islice

import lightning as L
import torch
from torch.utils.data import DataLoader

from relay_diffusion.models.relay import Relay, SampleBatch
from relay_diffusion.sampling.plan import Plan
from relay_diffusion.sampling.prompts import PromptStates
from relay_diffusion.utils.parallel import map_in_order


class PlanDataModule(L.LightningDataModule):
    """Batches of the missing images of a plan.

    todo: positions in the plan. batch_size: images per batch on one device; images that keep their sizes are batches of
    one. relay: encodes the prompts of the plan; None: it has none. The last batch of a rank is padded, because the last
    bit of an image depends on the batch size. So a resumed run, or a run on other devices, makes the same files.
    """

    def __init__(self, plan: Plan, todo: Sequence[int], batch_size: int, relay: Relay | None = None) -> None:
        super().__init__()
        self._states = None if relay is None or plan.prompts is None else PromptStates(relay, plan)
        self.plan, self.todo = plan, list(todo)
        self.batch_size = batch_size if plan.sizes is None else 1

    def predict_dataloader(self) -> DataLoader[int]:
        """Return the batches of this rank, and encode its prompts."""
        assert self.trainer is not None
        mine = self.todo[self.trainer.global_rank :: self.trainer.world_size]
        if self._states is not None:
            self._states.prepare(mine, show_progress=self.trainer.is_global_zero)
        return DataLoader(mine, batch_size=self.batch_size, collate_fn=self._batch)  # type: ignore[arg-type]

    def _batch(self, positions: Iterable[int]) -> SampleBatch:
        positions, plan = list(positions), self.plan
        size = min(self.batch_size, len(plan.names))
        filled = positions + positions[-1:] * (size - len(positions))
        seeds = [plan.seeds[position] for position in filled]
        labels = [plan.labels[position] for position in filled]
        start = None
        if plan.start is not None:
            start = torch.stack([image for image, _ in map_in_order(plan.start.__getitem__, seeds)])
        text, negative = None, None
        if self._states is not None:
            text = self._states.lookup([plan.prompt(position) for position in filled])
            if plan.negative_prompt.strip():
                negative = self._states.lookup([plan.negative_prompt])
        return SampleBatch(torch.tensor(positions), torch.tensor(seeds), torch.tensor(labels), start, text, negative)


def rank_order(todo: Sequence[int], shown: int, devices: int) -> list[int]:
    """Order positions so that every rank gets an image.

    Rank 0 gets the first `shown` images first. Images are repeated if there are fewer than ranks.
    """
    count = max(len(todo), devices, (shown - 1) * devices + 1)
    repeated = list(islice(cycle(todo), count))
    first, others = iter(repeated[:shown]), iter(repeated[shown:])
    turns = (first if k % devices == 0 and k // devices < shown else others for k in range(count))
    return [next(turn) for turn in turns]
