"""Relay Diffusion: cascades of diffusion stages that start from each other's images (arXiv 2309.03350).

import relay_diffusion as rd

relay = rd.load_relay("demo/emoji")
images = relay.sample(seeds=range(4), labels="animals-nature")  # [4,3,256,256] in [-1, 1]
relay.to_pil(images)[0].save("emoji.png")
"""

import sys

from relay_diffusion.utils.lazy import lazy_exports

__version__ = "0.1.0"

_EXPORTS = {  # imported on first use (PEP 562): the package alone imports neither torch nor lightning
    "load_stage": "checkpoints.loading",
    "load_relay": "checkpoints.loading",
    "DiffusionStage": "models.stage",
    "Relay": "models.relay",
    "EDMSampler": "samplers.edm",
    "BlurringSampler": "samplers.blurring",
    "MultistepSampler": "samplers.multistep",
    "GaussianCorruption": "diffusion.corruption",
    "BlurringCorruption": "diffusion.corruption",
    "UserError": "errors",
}
__all__ = [*_EXPORTS, "__version__"]


__getattr__ = lazy_exports(__name__, _EXPORTS)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


COMMANDS = ("cli.convert_images", "cli.convert_checkpoint", "cli.neighbours", "cli.spectrum")


def _refuse_other_modules() -> None:
    """End `python -m` of a module that is no command: it would define functions, and exit with 0."""
    name = sys.orig_argv[-len(sys.argv)].removeprefix("-m")
    if name.split(".")[0] == __name__ and name not in {f"{__name__}.{command}" for command in COMMANDS}:
        commands = ", ".join(["train.py", "sample.py", *(f"-m {__name__}.{command}" for command in COMMANDS)])
        print(f"error: {name} is not a command; python runs {commands}", file=sys.stderr)
        raise SystemExit(2)


if sys.argv[:1] == ["-m"]:  # Python imports this package while it looks for the module to run
    _refuse_other_modules()
