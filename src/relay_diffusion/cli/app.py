"""Web app: draw, enlarge and compare in the browser."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from omegaconf import MISSING

from relay_diffusion.cli.arguments import listed, run_tool
from relay_diffusion.errors import UserError, require
from relay_diffusion.utils.installed import require_library
from relay_diffusion.utils.messages import did_you_mean

if TYPE_CHECKING:
    from relay_diffusion.models.relay import Relay

USAGE = """\
python -m relay_diffusion.cli.app relay=RELAY [key=value ...]

  relay           a name as for sample.py (emoji, photos, ...), a folder with relay.json, or hf://USER/NAME
  enlarge         more relays for the tab Enlarge: photos,other
  host            address to listen on (127.0.0.1: this machine only); 0.0.0.0 lets everyone on the network use the app
  port            port (7860); 0: any free one
  max_megapixels  maximum size of an enlarged image (8)
  max_images      maximum number of images per job (16)
  batch_size      images sampled at once (8); fewer take less memory
  device          auto: a GPU if there is one (default) | cpu | cuda
  trusted         packages besides relay_diffusion whose classes the checkpoints may name: my_package,other

The app sends nothing to other hosts and needs no internet. Its files lie in a temporary folder, which is removed at the
end (Ctrl-C). gradio must be installed: pip install -e '.[app]'
"""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
DEVICES = ("auto", "cpu", "cuda")


@dataclass
class AppOptions:
    """Options of this command; see USAGE."""

    relay: str = MISSING
    enlarge: str = ""
    host: str = "127.0.0.1"
    port: int = 7860
    max_megapixels: float = 8.0
    max_images: int = 16
    batch_size: int = 8
    device: str = "auto"
    trusted: str = ""


def serve(options: AppOptions) -> None:
    """Load the relays and serve the page until Ctrl-C or SIGTERM."""
    require_library(f"relay={options.relay}: the app", "gradio", "app")
    require(options.device in DEVICES, f"device={options.device}: use {', '.join(DEVICES)}")
    port = usable_port(options.host, options.port)
    from relay_diffusion.app.studio import Limits, build_studio

    try:
        limits = Limits(options.max_images, options.batch_size, options.max_megapixels)
    except ValueError as error:
        raise UserError(str(error)) from None
    name, trusted = Path(options.relay).name, listed(options.trusted)
    relay = _load("relay", options.relay, options.device, trusted)
    others = {Path(other).name: _load("enlarge", other, options.device, trusted) for other in listed(options.enlarge)}
    studio = build_studio(name, relay, others, limits)
    from relay_diffusion.app.server import serving

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # leave the blocks below
    with serving(studio, options.host, port) as url:
        if options.host not in LOOPBACK:
            print(f"note: host={options.host}: everyone who reaches this machine can use the app", flush=True)
        print(f"open {url} in a browser; Ctrl-C ends the app", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


def _load(option: str, source: str, device: str, trusted: list[str]) -> Relay:
    """Load a relay to a device. Raises UserError naming `option` for another name or folder."""
    import torch

    from relay_diffusion.checkpoints.loading import bundled_relays, find_relay, load_relay, needs_no_paths

    path = Path(source).expanduser()
    place = path if path.exists() else source
    try:
        relay = load_relay(place, trusted=trusted)
    except UserError:
        if find_relay(place) is not None or needs_no_paths(source):
            raise
        raise UserError(
            f"{option}={source}: must be a choice of conf/relay that needs no paths, a folder with relay.json, or "
            f"hf://USER/NAME{did_you_mean(source, bundled_relays())}"
        ) from None
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    require(device == "cpu" or torch.cuda.is_available(), "device=cuda: there is no GPU here; use device=cpu")
    return relay.to(device)


def usable_port(host: str, port: int) -> int:
    """Return a port that is free, itself unless it is 0.

    Raises UserError for a host or port that cannot be used.
    """
    require(0 <= port < 2**16, f"port={port}: must lie between 0 and {2**16 - 1}; 0 takes any free one")
    try:
        with socket.create_server((host, port)) as trial:
            number: int = trial.getsockname()[1]
            return number
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error
        raise UserError(f"host={host} port={port}: cannot be used ({reason}); port=0 takes any free one") from None


def main() -> NoReturn:
    """Run the command."""
    sys.exit(run_tool(sys.argv[1:], USAGE, AppOptions, serve))


if __name__ == "__main__":
    main()
