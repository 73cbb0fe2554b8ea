"""Execute notebooks and write their outputs into them.

python scripts/run_notebooks.py [notebook=notebooks/NAME.ipynb]

notebook   the one to execute (default: all in notebooks/)

Needs `pip install -e '.[notebooks]'`. A notebook with an error is not written.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from relay_diffusion.cli.arguments import run_tool
from relay_diffusion.errors import UserError
from relay_diffusion.utils.files import write_text
from relay_diffusion.utils.messages import one_line

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
PARAMETERS = "parameters"  # tag of the cell with the settings
QUIET = "ignore:IProgress not found"  # of tqdm without ipywidgets, which no notebook needs
TIMEOUT = 3600  # seconds for one cell


@dataclass
class Options:
    """Options of this command; see above."""

    notebook: str | None = None


def execute(path: Path, parameters: Mapping[str, Any] | None = None) -> NotebookNode:
    """Execute a notebook in its folder, with a new kernel; return it with outputs.

    parameters: values that replace those of the cell tagged `parameters`. Raises KeyError for a name that this cell
    does not set, nbclient's CellExecutionError for an error in a cell.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except (OSError, ValueError, nbformat.ValidationError) as error:
        raise UserError(f"notebook={path}: is not a notebook ({one_line(error)})") from None
    if parameters:
        (cell,) = (cell for cell in notebook.cells if PARAMETERS in cell.metadata.get("tags", []))
        if unknown := [name for name in parameters if f"\n{name} = " not in f"\n{cell.source}"]:
            raise KeyError(f"{path.name}: its parameters do not include {', '.join(unknown)}")
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,  # equal outputs give an equal file
        coalesce_streams=True,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.create_kernel_manager().transport_encryption = "auto"  # other users can read local sockets otherwise
    return client.execute(env=os.environ | {"PYTHONWARNINGS": QUIET})


def run(options: Options) -> None:
    """Execute the notebook, or all, and write them."""
    for path in [Path(options.notebook)] if options.notebook else sorted(NOTEBOOKS.glob("*.ipynb")):
        began = time.monotonic()
        write_text(path, nbformat.writes(execute(path)) + "\n")
        print(f"{path.name}: {time.monotonic() - began:.0f} s, {path.stat().st_size / 1000:.0f} KB", flush=True)


if __name__ == "__main__":
    sys.exit(run_tool(sys.argv[1:], __doc__ or "", Options, run))
