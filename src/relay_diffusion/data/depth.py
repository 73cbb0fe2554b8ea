"""A warning about 16-bit images that use little of their range, and would become dark."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress

from lightning.fabric.utilities.rank_zero import rank_zero_only

from relay_diffusion.data.decode import FULL_DEPTH, UNUSED_BITS, dark_warning
from relay_diffusion.data.sources import ImageSource
from relay_diffusion.errors import UserError
from relay_diffusion.utils.parallel import map_in_order

LOOKED_AT = 16  # images, evenly over the set


@rank_zero_only
def warn_of_unused_range(source: ImageSource, names: Sequence[str]) -> None:
    """Print a warning if the images have 16 bits and use less than a quarter of that range; decodes a few of them."""
    with suppress(UserError):  # a damaged image is reported where it is used
        if not source.decoded(names[0]).bits:
            return
        chosen = names[:: -(-len(names) // LOOKED_AT)]
        bits = max(decoded.bits for decoded in map_in_order(source.decoded, chosen))
        if bits <= FULL_DEPTH - UNUSED_BITS:
            what = f"{source.option}={source.path}: 16-bit images"
            command = "`python -m relay_diffusion.cli.convert_images` with "
            print(dark_warning(what, bits, FULL_DEPTH, command), file=sys.stderr, flush=True)
