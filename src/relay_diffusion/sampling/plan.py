"""Plan of a sampling run: names, seeds, classes and starting images."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from relay_diffusion.data.dataset import ImageDataset
from relay_diffusion.data.start_images import StartImages
from relay_diffusion.data.zip_writer import png_names
from relay_diffusion.errors import UserError
from relay_diffusion.sampling.seeds import parse_seeds
from relay_diffusion.utils.resolution import Size

FOLDER_SIZE = 1000  # images in one sub-folder


@dataclass(frozen=True)
class Plan:
    """Images of a run in order.

    names: paths without .png. labels: -1 is no class. start: starting images, index k for seed k; None: noise. sizes:
    height and width of each starting image; None: all images have one size. classes: the chosen classes, taken in turn;
    None: not chosen. prompts: likewise, "" is no text; None: the relay has no text. negative_prompt: of all images; "":
    none.
    """

    names: list[str]
    seeds: list[int]
    labels: list[int]
    start: ImageDataset | StartImages | None = None
    sizes: list[Size] | None = None
    classes: list[int] | None = None
    prompts: list[str] | None = None
    negative_prompt: str = ""

    @property
    def has_text(self) -> bool:
        """Whether any prompt, or the negative one, is not blank."""
        return any(text.strip() for text in (*(self.prompts or []), self.negative_prompt))

    def prompt(self, position: int) -> str:
        """Return the prompt of an image; "" without text."""
        return self.prompts[self.seeds[position] % len(self.prompts)] if self.prompts else ""

    def png_text(self, position: int) -> dict[str, str]:
        """Return the text chunks of an image file; none without prompts."""
        texts = {"prompt": self.prompt(position), "negative_prompt": self.negative_prompt}
        given = {keyword: text for keyword, text in texts.items() if text.strip()}
        return given | {"seed": str(self.seeds[position])} if given else {}


def plan_from_noise(seeds: object, classes: Sequence[int]) -> Plan:
    """Plan one image per seed; classes alternate by seed (as published)."""
    chosen = parse_seeds(seeds)
    names = [f"{seed // FOLDER_SIZE * FOLDER_SIZE:08d}/seed{seed:08d}" for seed in chosen]
    return Plan(names, chosen, [classes[seed % len(classes)] for seed in chosen])


def plan_from_images(start: ImageDataset | StartImages, seeds: object, classes: Sequence[int] | None) -> Plan:
    """Plan one image per starting image, under its name.

    Image k has seed k. `seeds` selects images (null: all). Without `classes` each image has its class in dataset.json,
    or none. Raises UserError for seeds out of range, and for two images with one file name.
    """
    chosen = list(range(len(start.names))) if seeds is None else parse_seeds(seeds)
    if max(chosen) >= len(start.names):
        raise UserError(
            f"seeds={seeds}: relay.start={start.path} holds {len(start.names)} images, numbers 0 to "
            f"{len(start.names) - 1}"
        )
    names = png_names(start.names)
    if len(set(names.values())) < len(names):
        twice = next(name for name, count in Counter(names.values()).items() if count > 1)
        raise UserError(f"relay.start={start.path}: two of its images would be written as {twice}: rename one")
    labels = start.labels if classes is None else [classes[k % len(classes)] for k in range(len(start.names))]
    chosen_names = [names[start.names[k]].removesuffix(".png") for k in chosen]
    return Plan(chosen_names, chosen, [labels[k] for k in chosen], start)
