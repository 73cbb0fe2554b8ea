"""One random generator per image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from relay_diffusion.diffusion.noise import AHEAD


def mix_seeds(seed: int, stream: int) -> int:
    """Hash the pair (seed, stream) to a 63-bit seed with splitmix64."""
    mask = (1 << 64) - 1
    z = (seed * 0x9E3779B97F4A7C15 + (stream + 1) * 0xD1B54A32D192ED03) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return (z ^ (z >> 31)) >> 1


def manual_seed(seed: int, device: torch.device) -> None:
    """Seed torch's generators of the CPU and of `device`.

    torch.manual_seed also queues the seed for every backend that is not in use, which takes longer than a small kernel.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


class PerImageGenerator:
    """One random generator per image: samples do not depend on the batch.

    `seeds`: one integer per image. `stream` separates uses of the same seed (the stages of a relay): equal
    seeds in different streams give independent noise. Noise is drawn in float32, so that it does not depend on the
    precision of the sampler's state.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu", stream: int = 0) -> None:
        self.generators = [torch.Generator(device).manual_seed(mix_seeds(int(seed), stream)) for seed in seeds]
        self._drawn: list[Tensor] = []  # noise drawn in advance, the next one last

    def __len__(self) -> int:
        return len(self.generators)

    def randn_like(self, x: Tensor) -> Tensor:
        """Draw standard normal noise like x [B,C,H,W], image i from generator i.

        Raises ValueError if B differs from the number of seeds.
        """
        if len(x) != len(self.generators):
            raise ValueError(f"{len(self.generators)} seeds for a batch of {len(x)} images: give one seed per image")
        if not self._drawn or self._drawn[-1].shape != x.shape:
            self._drawn = self._draw(x)
        return self._drawn.pop().to(x.dtype, memory_format=torch.contiguous_format)

    def _draw(self, x: Tensor) -> list[Tensor]:
        ahead = AHEAD.get(x.device.type, 1)
        noise = torch.empty(len(x), ahead, *x.shape[1:], dtype=torch.float32, device=x.device)
        for image, generator in zip(noise, self.generators, strict=True):
            image.normal_(generator=generator)
        return list(noise.unbind(1))[::-1]
