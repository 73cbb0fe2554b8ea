"""Relay Diffusion: cascades of diffusion stages that start from each other's images (arXiv 2309.03350)."""

import sys

__version__ = "0.1.0"

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
