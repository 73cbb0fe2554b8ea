"""Files of a custom pipeline of diffusers in a relay's folder.

    FOLDER/model_index.json   the classes that diffusers builds
    FOLDER/pipeline.py        imports the pipeline from relay_diffusion

Neither depends on the relay. Writing them does not need diffusers.
"""

from __future__ import annotations

from pathlib import Path

from relay_diffusion.utils.files import json_text, write_text
from relay_diffusion.utils.installed import install_command

INDEX_FILE, PIPELINE_FILE = "model_index.json", "pipeline.py"
MODULE = "relay_diffusion.checkpoints.diffusers_pipeline"
INSTALL = install_command("diffusers")
MISSING = f"this pipeline needs the library relay-diffusion; in a clone of it: {INSTALL}"
INDEX = {"_class_name": ["pipeline", "RelayPipeline"], "relay": [MODULE, "RelayLoader"]}
PIPELINE = f'''\
"""Relay Diffusion as a custom pipeline of diffusers; the library relay-diffusion has its code."""

try:
    from {MODULE} import RelayPipeline  # noqa: F401
except ModuleNotFoundError as error:
    if not str(error.name).startswith("relay_diffusion"):
        raise
    raise ImportError({MISSING!r}) from None
'''


def write_diffusers_files(folder: Path) -> None:
    """Write model_index.json and pipeline.py beside relay.json."""
    write_text(folder / PIPELINE_FILE, PIPELINE)
    write_text(folder / INDEX_FILE, json_text(INDEX))
