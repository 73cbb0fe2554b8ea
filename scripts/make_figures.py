"""Draw figures of README.md and docs/ again.

python scripts/make_figures.py figures=NAME[,NAME...] [key=value ...]

figures  file names in docs/, such as demo.webp,prompts.webp
docs     folder of the figures                                 (docs)
output   folder for samples and trainings of the commands      (outputs/figures)

Prints and runs the commands of each figure in the root of the repository. CONTRIBUTING.md lists the figures with the
files that they need. An interrupted command resumes; delete `output` to repeat finished ones.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from omegaconf import MISSING
from PIL import Image

from relay_diffusion.cli.arguments import listed, run_tool
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import atomic_write
from relay_diffusion.utils.messages import did_you_mean
from relay_diffusion.utils.pictures import save_still_webp

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {  # files that are not in the repository: the page with the commands that make them
    "data/emoji-256.zip": "docs/baselines.md",
    "data/emoji-text-64.zip": "docs/emoji-text.md",
    "data/noto-1000.zip": "docs/your-images.md",
    "data/photos.zip": "docs/photos.md",
    "outputs/emoji_64_long": "docs/relay-vs-cascade.md",
    "outputs/emoji_256": "docs/relay-vs-cascade.md",
    "outputs/noto": "docs/your-images.md",
    "photos-256.zip": "docs/spectrum.md",
}
STYLES = ("3D", "flat", "Noto", "Twemoji")
NAMES = ("red apple", "pizza", "rocket", "dog face", "guitar", "woman firefighter", "hot beverage", "grinning face")
PROMPTS = [f"{name}, {style} style" for name, style in product(NAMES, STYLES)]
FREE_PROMPTS = [
    "a sleeping red fox, flat style", "a purple apple, 3D style", "a blue pizza, 3D style", "a robot cat, Noto style",
    "a green dragon with sunglasses, 3D style", "a penguin with a hat, Twemoji style", "a house on fire, 3D style",
    "a yellow submarine, flat style", "feline, flat style", "smartphone, 3D style", "sneaker, flat style",
    "spectacles, Noto style", "steed, 3D style", "blaze, 3D style", "vessel, flat style", "physician, Noto style",
]  # fmt: skip
SECOND_ORDER = "sampler@relay.stages.base.sampler=edm sampler@relay.stages.relay.sampler=blurring"


@dataclass(frozen=True)
class Figure:
    """A figure and the commands that draw it.

    commands: arguments of Python, with the placeholders {figure} (the file to write), {folder} (a folder of its own)
    and {drawings} (the program of docs/your-images.md). picture: file in {folder} that becomes the figure; "" if the
    last command writes {figure}. width: of the figure in pixels; 0 keeps that of the picture. quality: of a WebP.
    """

    commands: tuple[str, ...]
    picture: str = ""
    width: int = 0
    quality: int = 80
    needs: tuple[str, ...] = ()


def prompt_figure(prompts: list[str], seeds: int, columns: int) -> Figure:
    """Draw `seeds` samples of each prompt."""
    return Figure(
        (
            f"sample.py relay=emoji {shlex.quote(f'prompt={prompts}')} seeds=0-{len(prompts) * seeds - 1} picture=0"
            " format=zip output={folder}",
            f"benchmarks/prompt_picture.py images={{folder}}/images.zip columns={columns} side=72 picture={{figure}}",
        )
    )


def spectrum_figure(options: str, picture: str, *needs: str) -> Figure:
    """Draw power spectra."""
    command = f"-m relay_diffusion.cli.spectrum {options} output={{folder}} overwrite=true"
    return Figure((command,), picture, needs=needs)


FIGURES = {
    "app.webp": Figure(("scripts/make_app_screenshot.py picture={figure}",)),
    "cats.webp": Figure(
        ("sample.py relay=emoji \"prompt=['cat face, 3D style', 'cat face, Noto style']\" seeds=0-3 output={folder}",),
        "relay.png",
    ),
    "demo.webp": Figure(
        ("sample.py relay=emoji prompts=demo/prompts.txt seeds=0-7 batch_size=8 output={folder}",),
        "relay.png",
        quality=85,
    ),
    "emoji-text-neighbours.webp": Figure(
        (
            "sample.py relay=emoji relay.last=base prompt=reference reference=data/emoji-text-64.zip"
            " seeds=[0-11,24-35] output={folder}",
            "-m relay_diffusion.cli.neighbours images={folder}/images reference=data/emoji-text-64.zip subset=train"
            " count=24 mirrored=false destination={folder} overwrite=true",
        ),
        "neighbours.png",
        needs=("data/emoji-text-64.zip",),
    ),
    "enlarged.webp": Figure(
        (
            "sample.py relay=emoji relay.start=data/emoji-text-64.zip relay.start_subset=heldout"
            " seeds=[89,133,265,438] output={folder}",
        ),
        "relay.png",
        width=1561,
        quality=85,
        needs=("data/emoji-text-64.zip",),
    ),
    "evaluations.png": Figure(("benchmarks/evaluations_plot.py points=docs/evaluations.csv plot={figure}",)),
    "forward-process.webp": Figure(("scripts/draw_forward_process.py picture={figure}",)),
    "neighbours.webp": Figure(
        (
            f"sample.py relay=emoji_classes class=reference seeds=0-31 {SECOND_ORDER} output={{folder}}",
            "-m relay_diffusion.cli.neighbours images={folder}/images reference=data/emoji-256.zip subset=train"
            " destination={folder} overwrite=true",
        ),
        "neighbours.png",
        width=1300,
        needs=("data/emoji-256.zip", "outputs/emoji_64_long", "outputs/emoji_256"),
    ),
    "own-images.webp": Figure(
        (
            "sample.py relay=two_stages relay.stages.base.path=outputs/noto/base"
            " relay.stages.relay.path=outputs/noto/relay class=reference reference=data/noto-1000.zip seeds=0-255"
            " output={folder}",
        ),
        "relay.png",
        width=1300,
        needs=("data/noto-1000.zip", "outputs/noto"),
    ),
    "photos-heldout.png": Figure(("benchmarks/enlarging_plot.py points=docs/photos-heldout.csv plot={figure}",)),
    "photos.webp": Figure(
        (
            "benchmarks/enlarging_picture.py picture={figure}"
            " crops=erase_kingfisher:3,erase_red_panda:1,monuments_mysorePalace:1,world_jaguar:3",
        ),
        needs=("data/photos.zip",),
    ),
    "prompts-free.webp": prompt_figure(FREE_PROMPTS, seeds=8, columns=2),
    "prompts.webp": prompt_figure(PROMPTS, seeds=4, columns=4),
    "quickstart.webp": Figure(
        ("train.py experiment=quickstart_relay run_dir={folder}",),
        "samples/images-000005000.png",
    ),
    "relay-vs-cascade.png": Figure(
        (
            "benchmarks/comparison_plot.py points=docs/relay-vs-cascade.csv"
            " curves=relay,cascade,relay_short,cascade_short,single plot={figure}",
        )
    ),
    "spectrum-photos.png": spectrum_figure(
        "images=photos-256.zip resolutions=64,256", "spectrum.png", "photos-256.zip"
    ),
    "spectrum-snr.png": spectrum_figure("images=demo/emoji-64.zip", "snr.png"),
    "spectrum.png": spectrum_figure("images=demo/emoji-64.zip", "spectrum.png"),
    "trajectory.webp": Figure(
        (
            "sample.py relay=emoji \"prompt=['red apple, 3D style', 'guitar, 3D style']\" seeds=[0,3]"
            f" save_trajectory=2 {SECOND_ORDER} output={{folder}}",
        ),
        "trajectory.png",
        width=1600,
    ),
    "your-images.webp": Figure(
        (
            "-c {drawings}",
            "-m relay_diffusion.cli.convert_images source={folder}/drawings destination={folder}/mine.zip"
            " skip_bad=true upscale=true fit=pad overwrite=true",
            *(
                f"train.py experiment=quickstart_{stage} data=folder data.dataset.path={{folder}}/mine.zip"
                f" network.num_classes=null run_dir={{folder}}/{stage}"
                for stage in ("base", "relay")
            ),
            "sample.py relay=two_stages relay.stages.base.path={folder}/base relay.stages.relay.path={folder}/relay"
            " seeds=0-15 output={folder}/samples",
        ),
        "samples/relay.png",
    ),
}


@dataclass
class Options:
    """Options of this command; see above."""

    figures: str = MISSING
    docs: str = "docs"
    output: str = "outputs/figures"


def drawings(folder: Path) -> str:
    """Return the program of docs/your-images.md that writes a folder `drawings`, here in `folder`."""
    page = (ROOT / "docs/your-images.md").read_text()
    program = re.search(r"<!-- python: here -->\n```python\n(.*?)```", page, re.DOTALL)
    assert program is not None
    return f"import os\nos.makedirs({str(folder)!r}, exist_ok=True)\nos.chdir({str(folder)!r})\n{program[1]}"


def commands(figure: Figure, path: Path, folder: Path) -> Iterator[list[str]]:
    """Yield the arguments of each command, without Python itself."""
    places = {"{figure}": str(path), "{folder}": str(folder), "{drawings}": drawings(folder)}
    for command in figure.commands:
        yield [re.sub(r"\{\w+\}", lambda match: places[match[0]], word) for word in shlex.split(command)]


def convert(picture: Path, figure: Figure, path: Path) -> None:
    """Write a picture as WebP of the figure's width and quality, or copy a PNG."""
    if path.suffix == ".png":
        with atomic_write(path) as file:
            file.write(picture.read_bytes())
        return
    with Image.open(picture) as image:
        shown = image.convert("RGB")
    if figure.width:
        size = figure.width, int(shown.height * figure.width / shown.width)
        shown = shown.resize(size, Image.Resampling.LANCZOS)
    save_still_webp(shown, path, figure.quality)


def make(name: str, options: Options) -> None:
    """Run the commands of one figure. Raises UserError if a file is missing or a command fails."""
    figure, path = FIGURES[name], Path(options.docs).resolve() / name
    for need in figure.needs:
        if not (ROOT / need).exists():
            raise UserError(f"figures={name}: needs {need}; {NEEDS[need]} has the commands that make it")
    folder = Path(options.output).resolve() / path.stem
    for arguments in commands(figure, path, folder):
        print("python", shlex.join(arguments), flush=True)
        if subprocess.run([sys.executable, *arguments], cwd=ROOT, check=False).returncode:
            raise UserError(f"figures={name}: the command above failed; correct its error and repeat")
    if figure.picture:
        convert(folder / figure.picture, figure, path)
    print(f"{path}: {path.stat().st_size / 1000:.0f} KB")


def run(options: Options) -> None:
    """Draw the chosen figures."""
    names = listed(options.figures)
    for name in names:
        if name not in FIGURES:
            raise UserError(f"figures={name}: unknown{did_you_mean(name, FIGURES)}")
    for name in names:
        make(name, options)


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], __doc__ or "", Options, run))
